"""Hidden state of networks: what a forward reads or changes besides inputs and parameters.

A user's network may draw from a shared random generator (dropout) or change its buffers (running
statistics, power iterations, codebooks). :class:`Forwards` makes each forward of a phase a function
of (parameters, buffers at the start of the phase, inputs, seed, positions):

* The generators are seeded before it by (seed, stream, position of the first sample of the part).
* It starts from the buffers at the start of the phase. Its changes are set aside. After the phase,
  unless the step is skipped, the buffers become the mean over forwards, parts and workers.

So the order and number of forwards do not matter, and buffers are identical on every rank; under
``run.reduction = "canonical"`` they are bit-identical on any number of workers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatdist.common.seeding import seed_all
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction


@dataclass(frozen=True)
class Traits:
    """What :mod:`gatdist.game.contract` finds out about a network.

    Attributes:
        generators: Names of the random generators that a forward or backward draws from.
        buffers: Names of the buffers that a forward changes, without ``synchronized`` ones.
        synchronized: Names of the buffers of batch normalization, which synchronizes the workers.
        attributes: Names of plain attributes (numbers, tensors, generators) that a forward changes.
        is_erratic: Whether outputs for the same input differ, with all of the above being equal.
        may_skip_parameters: Whether a backward may leave a trainable parameter without a gradient.
        warnings: For the user.
    """

    generators: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    synchronized: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    is_erratic: bool = False
    may_skip_parameters: bool = False
    warnings: tuple[str, ...] = ()


class Forwards:
    """Makes the forwards of one bare network pure functions; see the module."""

    def __init__(self, network: nn.Module, traits: Traits, seed: int) -> None:
        self._seed = seed
        self._is_random = bool(traits.generators)
        self._buffers = [_Buffer(network, name) for name in traits.buffers]
        self._synchronized = [network.get_buffer(name) for name in traits.synchronized]
        self._before: list[Tensor] = []
        # Buffers after each forward, by (first position of the part, stream).
        self._made: dict[tuple[int, str], list[Tensor]] = {}

    @contextmanager
    def at(self, stream: str, batch: Batch) -> Iterator[None]:
        """Wrap a forward of a part of the batch; ``stream`` names it within the phase."""
        if self._is_random:
            seed_all(self._seed, f"{stream}/forward", batch.first)
        # Copies, because the graphs of earlier forwards may still need the tensors themselves.
        for buffer in self._buffers:
            buffer.swap(buffer.tensor.clone())
        try:
            yield
        finally:
            made = [buffer.swap(buffer.tensor) for buffer in self._buffers]
            if made:
                self._made[batch.first, stream] = made

    @torch.no_grad()
    def begin(self) -> None:
        """Start a phase."""
        self._made.clear()
        self._before = [tensor.clone() for tensor in self._synchronized]

    @torch.no_grad()
    def settle(self, reduction: Reduction, parts: Sequence[Batch], ok: Tensor) -> None:
        """Set the buffers after a phase; collective.

        Floating-point buffers become the mean over forwards, parts and workers; others (counters,
        masks) those of the first forward of the first part on worker 0. If ``ok`` is 0, the step
        is skipped and they keep their values. ``parts`` are in the order of the reduction.
        """
        for tensor, before in zip(self._synchronized, self._before, strict=True):
            # By .data: reused fakes have a graph with these statistics, which a backward in
            # training mode does not read.
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
    """A buffer and all modules that hold it."""

    def __init__(self, network: nn.Module, name: str) -> None:
        self.tensor = network.get_buffer(name)
        self._places = [
            (module, key)
            for module in network.modules()
            for key, tensor in module._buffers.items()
            if tensor is self.tensor
        ]

    def swap(self, tensor: Tensor) -> Tensor:
        """Let the modules hold ``tensor``; return what they held."""
        module, key = self._places[0]
        held = module._buffers[key]
        assert held is not None
        for module, key in self._places:
            module._buffers[key] = tensor
        return held.detach()

    def set(self, value: Tensor, ok: Tensor) -> None:
        self.tensor.copy_(value.to(self.tensor.dtype).where(ok > 0, self.tensor))


# Attributes of every nn.Module; ``training`` is set by its caller.
_OF_MODULES = frozenset(vars(nn.Module())) | {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MAX_DEPTH = 4
# How to read the state of a random generator.
_GENERATORS: dict[type, Callable[[Any], object]] = {
    torch.Generator: torch.Generator.get_state,
    random.Random: random.Random.getstate,
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.RandomState: lambda generator: generator.getfingerprint(legacy=False),
}


def attribute_states(network: nn.Module) -> dict[str, object]:
    """Return the :func:`fingerprint` of each attribute of its modules, by name."""
    states: dict[str, object] = {}
    for prefix, module in network.named_modules():
        of_class = {} if type(module).__module__.startswith("torch.") else vars(type(module))
        for key, value in {**of_class, **vars(module)}.items():
            if key not in _OF_MODULES and not key.startswith("__"):
                states[f"{prefix}.{key}".lstrip(".")] = fingerprint(value)
    return states


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names whose fingerprints differ."""
    names = before.keys() | after.keys()
    return tuple(sorted(name for name in names if before.get(name) != after.get(name)))


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaNs included."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def fingerprint(value: Any, depth: int = 0) -> object:
    """Return what a plain value holds, comparable by ``==``; None for values of other kinds."""
    for kind, read in _GENERATORS.items():
        if isinstance(value, kind):
            return "generator", fingerprint(read(value))
    if isinstance(value, Tensor):
        flat = value.detach().to("cpu", copy=True).contiguous().reshape(-1)
        has_bytes = flat.layout == torch.strided and not flat.is_quantized and flat.numel()
        held = flat.view(torch.uint8).numpy().tobytes() if has_bytes else b""
        return "tensor", str(value.dtype), tuple(value.shape), held
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, _PLAIN):
        return "value", repr(value)
    if depth == _MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        return "mapping", [(repr(key), fingerprint(each, depth + 1)) for key, each in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return "sequence", [fingerprint(each, depth + 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(map(repr, value))
    if isinstance(value, Iterator):
        return "iterator", repr(value)  # of itertools.count and the like
    return None
