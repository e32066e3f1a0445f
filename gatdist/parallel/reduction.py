"""Reduction of gradients and means over the parts of a batch and over the workers.

A worker's share of a batch goes through the networks in parts: micro-batches, or the shares of
virtual workers. Each part has a weight (``batch.weight``); weighted means are summed over parts and
workers.

* :class:`FastReduction`: the parts of one worker are summed in ``.grad``, and the workers' sums by
  DistributedDataParallel, which sends a bucket of gradients while the next is computed. Results on
  different numbers of workers are equal within rounding.
* :class:`CanonicalReduction`: the global batch is cut into the shares of L virtual workers
  (``run.virtual_workers``), the gradient of each share is computed by itself, and gradients are
  summed along one fixed tree. Results on 1, 2, 4 … L workers are bit-identical.

Position p of the global batch belongs to virtual worker p mod L, and worker r of W holds positions
r, r + W, …, hence all of the virtual workers r, r + W, …. The tree adds the sum of virtual worker
v + L/2 to that of v, then v + L/4 to v, and so on: its first levels lie within a worker for every
W, the last log₂ W are between workers.
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
    """Replicates networks, splits batches, and sums gradients over parts and workers."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    @classmethod
    def from_config(cls, config: Config, comm: Communicator) -> Reduction:
        if config.run.reduction == "canonical":
            return CanonicalReduction(comm, config.run.virtual_workers)
        return FastReduction(comm, config.precision.reduce_dtype == "bfloat16")

    @abstractmethod
    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        """Return ``network`` with worker 0's weights, in the wrapper that :meth:`gradients` needs.

        With ``may_skip``, a backward may leave a trainable parameter without a gradient, which
        counts as zero.
        """

    @abstractmethod
    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        """Split this worker's share of a batch into parts of equal size, each with its weight.

        ``micro_batch`` is the most samples per part; the largest divisor of n up to it is taken.
        """

    @abstractmethod
    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        """Sum weighted lists of tensors over all parts of all workers.

        ``parts`` are this worker's, in the order of :meth:`split`, and overwritten.
        """

    @abstractmethod
    def gradients(
        self, networks: Sequence[nn.Module], parts: Sequence[Batch], backward: Callable[[Batch], T]
    ) -> list[T]:
        """Leave the sum over all parts of all workers in ``.grad`` of ``networks``.

        Args:
            networks: from :meth:`replicate`, their gradients None.
            parts: this worker's.
            backward: adds one part's weighted gradient to ``.grad``.

        Returns:
            What ``backward`` returned for each part.
        """


class FastReduction(Reduction):
    """Data-parallel gradients with overlapped, bucketed all-reduces, optionally as bfloat16."""

    def __init__(self, comm: Communicator, compress: bool = False) -> None:
        super().__init__(comm)
        self._compress = compress

    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        # DistributedDataParallel waits for a gradient of each parameter. A network that may skip
        # some stays bare, and its gradients are averaged after the backward.
        if may_skip:
            return self.comm.broadcast_module_(network)
        return self.comm.replicate(network, compress=self._compress)

    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        count = micro_batches(len(batch.real), micro_batch)
        if count == 1:
            return [batch]
        return [batch.every(count, i).scaled(1 / count) for i in range(count)]

    def mean(self, parts: Iterable[Tensors]) -> Tensors:
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
        found = []
        for part in parts:
            with ExitStack() as stack:
                if part is not parts[-1]:  # only the last backward sends gradients
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
    """Sums virtual workers along one fixed tree; their number and W are powers of two."""

    def __init__(self, comm: Communicator, virtual_workers: int) -> None:
        super().__init__(comm)
        self.virtual_workers = virtual_workers

    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        return self.comm.broadcast_module_(network)

    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        # The worker's virtual workers in the order of the tree.
        count = self.virtual_workers // self.comm.world_size
        return [batch.every(count, i).scaled(1 / self.virtual_workers) for i in _reversed(count)]

    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        # A binary counter: two waiting sums of equally many parts are added. At most log₂ L wait.
        waiting: list[tuple[int, Tensors]] = []
        for part in parts:
            count, total = 1, list(part)
            while waiting and waiting[-1][0] == count:
                _, first = waiting.pop()
                torch._foreach_add_(first, total)
                count, total = 2 * count, first
            waiting.append((count, total))
        ((_, mine),) = waiting
        flat = _flatten(mine)  # for one worker too: kernels depend on memory layout
        return _unflatten(flat if self.comm.world_size == 1 else self._between(flat), mine)

    def gradients(
        self, networks: Sequence[nn.Module], parts: Sequence[Batch], backward: Callable[[Batch], T]
    ) -> list[T]:
        parameters = _parameters(networks)
        found: list[T] = []

        def gradient(part: Batch) -> Tensors:
            for p in parameters:
                p.grad = None
            found.append(backward(part))
            return _gradients(parameters)

        set_gradients(parameters, self.mean(map(gradient, parts)))
        return found

    def _between(self, flat: Tensor) -> Tensor:
        """Sum over the tree's last levels: each worker one slice of the vector, then gather all."""
        world_size, size = self.comm.world_size, flat.numel()
        padded = flat.new_zeros(world_size, -(-size // world_size))
        padded.view(-1)[:size] = flat
        rows = self.comm.all_to_all(padded)  # [W, slice]: every worker's sums for my slice
        while len(rows) > 1:
            half = len(rows) // 2
            rows = rows[:half] + rows[half:]
        return self.comm.all_gather(rows[0]).flatten()[:size]


def micro_batches(size: int, micro_batch: int | None) -> int:
    """Return the number of equal micro-batches of a share: the fewest of ``micro_batch`` or less.

    One if ``micro_batch`` is None.
    """
    if micro_batch is None:
        return 1
    return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= micro_batch)


@contextmanager
def _skipped_parameters_named() -> Iterator[None]:
    """Explain DistributedDataParallel's error about a parameter without a gradient."""
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
    """Set the parameters' ``.grad``, in the memory layout of the parameters.

    Fused optimizers iterate over both in memory order, and convolutions return other layouts.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        same = gradient.stride() == parameter.stride()
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)


def _parameters(networks: Sequence[nn.Module]) -> Tensors:
    return [p for network in networks for p in network.parameters() if p.requires_grad]


def _gradients(parameters: Sequence[Tensor]) -> Tensors:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _reversed(count: int) -> list[int]:
    """Return 0 to n − 1 (a power of two) in bit-reversed order: 0, n/2, n/4, 3n/4 and so on."""
    order = [0]
    while len(order) < count:
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    return order


def _flatten(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, like: Tensors) -> Tensors:
    pieces = flat.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]
