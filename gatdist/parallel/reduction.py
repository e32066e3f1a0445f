"""Reduction of gradients and means over the parts of a batch and over the workers.

A worker's share of a batch goes through the networks in parts: micro-batches, or the shares of
virtual workers. Each part has a weight (``batch.weight``); weighted means are summed over parts and
workers. Shares may differ by a sample, or by the samples of a virtual worker.

* :class:`FastReduction`: the parts of one worker are summed in ``.grad``, and the workers' sums by
  DistributedDataParallel, which sends a bucket of gradients while the next is computed. Results on
  different numbers of workers are equal within rounding.
* :class:`CanonicalReduction`: the global batch is cut into the shares of L virtual workers
  (``run.virtual_workers``), the gradient of each share is computed by itself, and gradients are
  summed along one fixed tree. Results on 1 to L workers are bit-identical.

Position p of the global batch belongs to virtual worker p mod L. The tree adds the sum of virtual
worker v + L/2 to that of v, then v + L/4 to v, and so on (:mod:`gatdist.parallel.tree`). A worker
holds neighbouring leaves of it. It adds up those that form complete subtrees, of which there is one
where W is a power of two and at most 2 log₂ L otherwise. The sums above them are between workers.
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
from gatdist.parallel.tree import bit_reversed, leaves_of, subtrees

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
        """Split this worker's share of a batch into parts, each with its weight.

        ``micro_batch`` is the most samples per part; sizes differ by at most one.
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
        count = micro_batches(len(batch), micro_batch)
        parts = [batch] if count == 1 else [batch.every(count, i) for i in range(count)]
        # The sum over workers is divided by their number.
        return [part.scaled(len(part) * self.comm.world_size / batch.total) for part in parts]

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
    """Sums virtual workers, whose number is a power of two, along one fixed tree."""

    def __init__(self, comm: Communicator, virtual_workers: int) -> None:
        super().__init__(comm)
        self.virtual_workers = virtual_workers

    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        return self.comm.broadcast_module_(network)

    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        order = bit_reversed(self.virtual_workers)
        mine = [order[leaf] for leaf in self._leaves(self.comm.rank)]
        # Samples are in the order of their positions, so virtual workers alternate.
        place = {v: i for i, v in enumerate(sorted(mine))}
        weight = 1 / self.virtual_workers
        return [batch.every(len(mine), place[v]).scaled(weight) for v in mine]

    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        leaves = self._leaves(self.comm.rank)
        sums = _added_up(
            (range(leaf, leaf + 1), list(part)) for leaf, part in zip(leaves, parts, strict=True)
        )
        like = sums[0][1]
        # For one worker too: kernels depend on memory layout.
        rows = [_flatten(total) for _, total in sums]
        return _unflatten(rows[0] if self.comm.world_size == 1 else self._between(rows), like)

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

    def _leaves(self, rank: int) -> range:
        return leaves_of(rank, self.comm.world_size, self.virtual_workers)

    def _between(self, mine: Tensors) -> Tensor:
        """Sum this worker's subtrees with those of the others, vectors of equal length.

        Each worker finishes the tree for one slice of the vectors, then all slices are gathered.
        """
        workers, size = self.comm.world_size, mine[0].numel()
        held = [subtrees(self._leaves(rank)) for rank in range(workers)]
        most, length = max(map(len, held)), -(-size // workers)
        vectors = mine[0].new_zeros(most, workers * length)
        for vector, subtree in zip(vectors, mine, strict=False):
            vector[:size] = subtree
        rows = vectors.view(most, workers, length).transpose(0, 1).reshape(workers, -1)
        received = self.comm.all_to_all(rows).view(workers, most, length)
        ((_, (total,)),) = _added_up(
            (subtree, [received[rank, i]])
            for rank in range(workers)
            for i, subtree in enumerate(held[rank])
        )
        return self.comm.all_gather(total).flatten()[:size]


def _added_up(sums: Iterable[tuple[range, Tensors]]) -> list[tuple[range, Tensors]]:
    """Add the sums of neighbouring subtrees in place, up the tree as far as they are complete.

    Of n single leaves, at most log₂ n sums wait for their neighbour.
    """
    found: list[tuple[range, Tensors]] = []
    for leaves, total in sums:
        while found and len(found[-1][0]) == len(leaves) and leaves.stop % (2 * len(leaves)) == 0:
            first, before = found.pop()
            torch._foreach_add_(before, total)
            leaves, total = range(first.start, leaves.stop), before
        found.append((leaves, total))
    return found


def micro_batches(size: int, micro_batch: int | None) -> int:
    """Return the fewest micro-batches of at most ``micro_batch`` samples; one if that is None."""
    return 1 if micro_batch is None else -(-size // micro_batch)


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


def _flatten(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, like: Tensors) -> Tensors:
    pieces = flat.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]
