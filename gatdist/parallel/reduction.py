"""How what each part of the global batch gives becomes the mean over all of it.

A worker's share of a batch goes through the networks in parts: micro-batches, or lanes. Both kinds
of reduction weigh each part's mean loss by :attr:`Reduction.weight` (in the update rules:
``batch.weight``) and then add up, over parts and workers.

* :class:`FastReduction`: the parts of one worker add up in ``.grad``, and those of the workers
  through DistributedDataParallel, which sends a bucket of gradients while the next is computed.
  Equal on any number of workers within rounding.
* :class:`CanonicalReduction`: the global batch is cut into L lanes, each lane's gradient is
  computed by itself, and lanes are added along one fixed tree. Equal bit for bit on 1, 2, 4 … L
  workers.

Position p of the global batch is in lane p mod L, and worker r of W holds positions r, r + W, …,
hence the lanes r, r + W, … whole. The tree adds lane l + L/2 to lane l, then l + L/4 to l, and so
on: the first levels lie within a worker for every W, the last log₂ W are between workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from gatdist.common.errors import PluginError
from gatdist.config import Config
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import Communicator, bare, without_reduction

T = TypeVar("T")
Tensors = list[Tensor]


class Reduction(ABC):
    """See the module.

    Args:
        comm: the workers.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    @classmethod
    def from_config(cls, config: Config, comm: Communicator) -> Reduction:
        """The reduction that ``run.reduction`` names."""
        if config.run.reduction == "canonical":
            return CanonicalReduction(comm, config.run.virtual_workers)
        return FastReduction(comm, config.precision.reduce_dtype == "bfloat16")

    @abstractmethod
    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        """``network`` with worker 0's weights, in whatever wrapper :meth:`gradients` needs.

        Args:
            network: on its device.
            may_skip: whether a backward may leave a trainable parameter without a gradient, which
                then counts as zero.
        """

    @abstractmethod
    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        """This worker's share of a batch as parts, each with its weight.

        Args:
            batch: n local samples.
            micro_batch: samples a part at most; parts are equal, so the largest divisor of n up to
                it is taken. None: all n.
        """

    @abstractmethod
    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        """The sum over all parts of all workers of lists of tensors that carry their weight.

        Args:
            parts: this worker's, in the order of :meth:`split`; may be computed one by one, and
                are overwritten.
        """

    @abstractmethod
    def gradients(
        self, networks: Sequence[nn.Module], parts: Sequence[Batch], backward: Callable[[Batch], T]
    ) -> list[T]:
        """Leave in ``.grad`` of ``networks`` the sum over all parts of all workers.

        Args:
            networks: as :meth:`replicate` gave them, their gradients None.
            parts: this worker's.
            backward: leaves one part's weighted gradient in ``.grad``.

        Returns:
            What ``backward`` returned, a part each.
        """


class FastReduction(Reduction):
    """Data-parallel gradients with overlapped, bucketed all-reduces.

    Args:
        comm: the workers.
        compress: send gradients as bfloat16.
    """

    def __init__(self, comm: Communicator, compress: bool = False) -> None:
        super().__init__(comm)
        self._compress = compress

    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        """In a DistributedDataParallel, where there are several workers.

        It waits for a gradient of each parameter. So a network that may skip some is left bare, and
        its gradients are averaged after the backward.
        """
        if may_skip:
            return self.comm.broadcast_module_(network)
        return self.comm.replicate(network, compress=self._compress)

    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        """Micro-batches; the workers' mean is taken by the reduction itself."""
        size = len(batch.real)
        count = 1
        if micro_batch is not None:
            count = next(
                n for n in range(1, size + 1) if size % n == 0 and size // n <= micro_batch
            )
        if count == 1:
            return [batch]
        return [batch.every(count, i).scaled(1 / count) for i in range(count)]

    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        """Added in the order of the parts, then over the workers in one collective."""
        total: Tensors = []
        for part in parts:
            total = [a + b for a, b in zip(total, part, strict=True)] if total else list(part)
        if self.comm.world_size == 1:
            return total
        flat = self.comm.all_reduce_(_flatten(total)).div_(self.comm.world_size)
        return _unflatten(flat, total)

    def gradients(
        self, networks: Sequence[nn.Module], parts: Sequence[Batch], backward: Callable[[Batch], T]
    ) -> list[T]:
        """Only the last part's backward sends anything, or what follows it."""
        found = []
        for part in parts:
            with ExitStack() as stack:
                if part is not parts[-1]:
                    for network in networks:
                        stack.enter_context(without_reduction(network))
                with _skipped_parameters_named():
                    found.append(backward(part))
        unreduced = [network for network in networks if bare(network) is network]
        if self.comm.world_size > 1 and unreduced:
            self._average(unreduced)
        return found

    def _average(self, networks: Sequence[nn.Module]) -> None:
        """All gradients in one collective, after the backward."""
        parameters = _parameters(networks)
        gradients = _gradients(parameters)
        mine = _flatten(gradients).div_(self.comm.world_size)
        sent = mine.to(torch.bfloat16) if self._compress else mine
        total = self.comm.all_reduce_(sent).to(mine.dtype)
        set_gradients(parameters, _unflatten(total, gradients))


class CanonicalReduction(Reduction):
    """Lane by lane, along one tree.

    Args:
        comm: the workers; a power of two, at most ``lanes``.
        lanes: L, a power of two.
    """

    def __init__(self, comm: Communicator, lanes: int) -> None:
        super().__init__(comm)
        self.lanes = lanes

    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        """As it is, with worker 0's weights."""
        return self.comm.broadcast_module_(network)

    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        """The worker's lanes in the order in which the tree meets them (bit-reversed)."""
        count = self.lanes // self.comm.world_size
        return [batch.every(count, i).scaled(1 / self.lanes) for i in _reversed(count)]

    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        """Within the worker as the parts come, then between workers."""
        # A binary counter: of any two waiting sums of equally many lanes, the first takes up the
        # second. At most log₂ of them wait.
        waiting: list[tuple[int, Tensors]] = []
        for part in parts:
            count, total = 1, list(part)
            while waiting and waiting[-1][0] == count:
                _, first = waiting.pop()
                torch._foreach_add_(first, total)
                count, total = 2 * count, first
            waiting.append((count, total))
        ((_, mine),) = waiting
        flat = _flatten(mine)  # alone too: sums and products look at how numbers lie in memory
        return _unflatten(flat if self.comm.world_size == 1 else self._between(flat), mine)

    def gradients(
        self, networks: Sequence[nn.Module], parts: Sequence[Batch], backward: Callable[[Batch], T]
    ) -> list[T]:
        """Each lane's backward starts from no gradient at all."""
        parameters = _parameters(networks)
        found: list[T] = []

        def lane(part: Batch) -> Tensors:
            for p in parameters:
                p.grad = None
            found.append(backward(part))
            return _gradients(parameters)

        set_gradients(parameters, self.mean(map(lane, parts)))
        return found

    def _between(self, flat: Tensor) -> Tensor:
        """The tree's last levels. Each worker adds one slice of the vector, then all get all."""
        world_size, size = self.comm.world_size, flat.numel()
        padded = flat.new_zeros(world_size, -(-size // world_size))
        padded.view(-1)[:size] = flat
        rows = self.comm.all_to_all(padded)  # [W, slice]: every worker's sums for my slice
        while len(rows) > 1:
            half = len(rows) // 2
            rows = rows[:half] + rows[half:]
        return self.comm.all_gather(rows[0]).flatten()[:size]


@contextmanager
def _skipped_parameters_named() -> Iterator[None]:
    """Say in gatdist's terms that DistributedDataParallel waits for a gradient that never came."""
    try:
        yield
    except RuntimeError as error:
        if "finished reduction" not in str(error):
            raise
        raise PluginError(
            "model",
            "a backward left trainable parameters of a network without a gradient, which it did "
            "not do when the run started",
            hint="Give the network the attribute may_skip_parameters = True",
        ) from error


def set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Make ``gradients`` the parameters' ``.grad``, laid out in memory as the parameters are.

    Fused optimizers go through both as they lie in memory, and products of convolutions come in
    other layouts.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        same = gradient.stride() == parameter.stride()
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)


def _parameters(networks: Sequence[nn.Module]) -> Tensors:
    """Those that learn."""
    return [p for network in networks for p in network.parameters() if p.requires_grad]


def _gradients(parameters: Sequence[Tensor]) -> Tensors:
    """The parameters' gradients; zeros where one took no part."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _reversed(count: int) -> list[int]:
    """0 to n − 1 (a power of two) by their reversed bits: 0, n/2, n/4, 3n/4 and so on."""
    order = [0]
    while len(order) < count:
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    return order


def _flatten(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, like: Tensors) -> Tensors:
    pieces = flat.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]
