"""How much a step sends: what its reduction asks for, and what the network interface counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from gatdist.bench.gatdist_case import GatdistCase
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction, Tensors

T = TypeVar("T")


def reduced_bytes(case: GatdistCase) -> int:
    """Bytes that one step adds up over the workers. Takes a step, on all workers alike."""
    usual = case.state.reduction
    counting = _Counting(usual, 2 if case.config.precision.reduce_dtype == "bfloat16" else None)
    case.state.reduction = counting
    try:
        case.step()
    finally:
        case.state.reduction = usual
    return counting.num_bytes


def ring_bytes(num_bytes: int, workers: int) -> int:
    """What each worker sends to add up ``num_bytes``: 2 (p − 1) / p of them.

    Of a ring, and where each worker adds up a slice; fewer do not do (Patarasuk and Yuan 2009).
    """
    return round(2 * (workers - 1) / workers * num_bytes)


def sent_by_interface(interface: str) -> int | None:
    """Bytes that a network interface of this host has ever sent; None where nobody counts them."""
    if not interface:
        return None
    try:
        return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
    except OSError:
        return None


class _Counting(Reduction):
    """Another reduction, and a count of what goes through it."""

    def __init__(self, inner: Reduction, element_bytes: int | None) -> None:
        super().__init__(inner.comm)
        self._inner, self._element_bytes = inner, element_bytes
        self.num_bytes = 0

    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        return self._inner.replicate(network, may_skip=may_skip)

    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        return self._inner.split(batch, micro_batch)

    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        total = self._inner.mean(parts)
        self.num_bytes += sum(t.nbytes for t in total)
        return total

    def gradients(
        self, networks: Sequence[nn.Module], parts: Sequence[Batch], backward: Callable[[Batch], T]
    ) -> list[T]:
        found = self._inner.gradients(networks, parts, backward)
        self.num_bytes += sum(
            self._bytes_of(p) for network in networks for p in network.parameters()
        )
        return found

    def _bytes_of(self, parameter: Tensor) -> int:
        if not parameter.requires_grad:
            return 0
        return parameter.numel() * (self._element_bytes or parameter.element_size())
