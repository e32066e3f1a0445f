"""Hidden state of networks: what a forward uses or changes beside its inputs and parameters.

A user's network may draw from a shared random generator (dropout) or change its buffers (running
statistics, power iterations, codebooks). Within a phase each forward is made a function of
(parameters, buffers at the beginning of the phase, inputs, seed, positions):

* The generators are seeded before it by (seed, stream, position of the part's first sample).
* It sees the buffers of the phase's beginning. What it makes of them is set aside, and after the
  phase the buffers become the mean over forwards, parts and workers (:meth:`Forwards.settle`), if
  the phase moves its players.

So the order and number of forwards do not matter, all workers hold the same buffers, and under
``run.reduction = "canonical"`` they are the same bits on any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatdist.common.seeding import seed_all
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction


@dataclass(frozen=True)
class Traits:
    """What :mod:`gatdist.game.contract` found out about a network.

    Attributes:
        generators: names of the random generators that a forward or backward draws from.
        buffers: names of the buffers that a forward changes, but for ``synchronized`` ones.
        synchronized: the same, of batch normalization, whose layers synchronize the workers.
        attributes: names of plain attributes (numbers, tensors, generators) that it changes.
        is_erratic: whether the same input gives another output, all of the above being equal.
        is_coupled: whether a sample's output depends on the other samples.
        unused: names of trainable parameters without a gradient.
        warnings: for people.
    """

    generators: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    synchronized: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    is_erratic: bool = False
    is_coupled: bool = False
    unused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def may_skip_parameters(self) -> bool:
        """Whether a backward may leave a trainable parameter without a gradient."""
        return bool(self.unused or self.generators)


class Forwards:
    """Makes forwards of one network pure; see the module.

    Args:
        network: bare, as the game calls it.
        traits: of this network.
        seed: of the run.
    """

    def __init__(self, network: nn.Module, traits: Traits, seed: int) -> None:
        self._seed = seed
        self._is_random = bool(traits.generators)
        self._buffers = [_Buffer(network, name) for name in traits.buffers]
        self._guarded = [network.get_buffer(name) for name in traits.synchronized]
        self._before: list[Tensor] = []
        # What forwards made of the buffers, by the part's first position and the stream.
        self._made: dict[tuple[int, str], list[Tensor]] = {}

    def at(self, stream: str, batch: Batch) -> AbstractContextManager[None]:
        """Around a forward of a part of the batch; ``stream`` names it within the phase."""
        if not self._is_random and not self._buffers:
            return nullcontext()
        return self._pure(stream, batch)

    @contextmanager
    def _pure(self, stream: str, batch: Batch) -> Iterator[None]:
        if self._is_random:
            seed_all(self._seed, f"{stream}/forward", batch.first)
        # New tensors, not changed ones: the graphs of earlier forwards may still need theirs.
        for buffer in self._buffers:
            buffer.replace()
        try:
            yield
        finally:
            made = [buffer.restore() for buffer in self._buffers]
            if made:
                self._made[batch.first, stream] = made

    @torch.no_grad()
    def begin(self) -> None:
        """Called before a phase."""
        self._made.clear()
        self._before = [tensor.clone() for tensor in self._guarded]

    @torch.no_grad()
    def settle(self, reduction: Reduction, parts: Sequence[Batch], ok: Tensor) -> None:
        """Called after a phase, on all workers.

        Floating-point buffers become the mean over forwards, parts and workers; others (counters,
        masks) what the first part's first forward on worker 0 made of them.

        Args:
            reduction: of the run.
            parts: this worker's, with their weights, in the order of the reduction.
            ok: where it is 0, buffers stay as they were.
        """
        for tensor, before in zip(self._guarded, self._before, strict=True):
            # By .data: fakes that are kept for the next phase have a graph with these statistics,
            # which a backward in training mode does not read.
            tensor.data.copy_(tensor.where(ok > 0, before))
        if not self._made:
            return
        by_part = [
            [self._made[key] for key in sorted(self._made) if key[0] == part.first]
            for part in parts
        ]
        floating = [i for i, b in enumerate(self._buffers) if b.tensor.is_floating_point()]
        if floating:
            means = reduction.mean(
                [
                    torch.stack([made[i].double() for made in forwards]).mean(0) * part.weight
                    for i in floating
                ]
                for part, forwards in zip(parts, by_part, strict=True)
            )
            for i, mean in zip(floating, means, strict=True):
                self._buffers[i].set(mean, ok)
        for i, buffer in enumerate(self._buffers):
            if i not in floating:
                first = by_part[0][0][i].contiguous()
                buffer.set(reduction.comm.broadcast_(first), ok)
        self._made.clear()


class _Buffer:
    """A buffer in all modules that hold it."""

    def __init__(self, network: nn.Module, name: str) -> None:
        self.tensor = network.get_buffer(name)
        self._places = [
            (module, key)
            for module in network.modules()
            for key, tensor in module._buffers.items()
            if tensor is self.tensor
        ]

    def replace(self) -> None:
        """Let the modules hold a copy."""
        copy = self.tensor.clone()
        for module, key in self._places:
            module._buffers[key] = copy

    def restore(self) -> Tensor:
        """Let them hold the tensor itself again; what they held."""
        module, key = self._places[0]
        made = module._buffers[key]
        assert made is not None
        for module, key in self._places:
            module._buffers[key] = self.tensor
        return made.detach()

    def set(self, value: Tensor, ok: Tensor) -> None:
        """Change the tensor, where ``ok`` is not 0."""
        self.tensor.copy_(value.to(self.tensor.dtype).where(ok > 0, self.tensor))
