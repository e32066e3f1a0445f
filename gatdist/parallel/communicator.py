"""Communication as an argument: a single process, a torch process group, or a fake.

No mathematics asks whether ``torch.distributed`` is initialized; it calls the communicator it was
given.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.profiler import record_function

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


class Communicator(ABC):
    """The workers of one run, seen from one of them.

    Attributes:
        rank: 0 to ``world_size`` − 1.
        world_size: number of workers.
        device: where this worker computes.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @property
    def is_main(self) -> bool:
        """True on the one worker that writes."""
        return self.rank == 0

    @torch.no_grad()
    def broadcast_module_(self, module: nn.Module) -> nn.Module:
        """Overwrite ``module``'s weights and buffers with worker 0's. Returns it."""
        for tensor in module.state_dict().values():
            self.broadcast_(tensor)
        return module

    @abstractmethod
    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all workers, in place; the same bits on every worker."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack every worker's ``tensor`` (equal shapes) by rank: [world_size, ...]."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite ``tensor`` with worker 0's."""

    @abstractmethod
    def broadcast_object(self, value: Any) -> Any:
        """Worker 0's ``value``, which must consist of JSON values; the others' is ignored."""

    @abstractmethod
    def all_to_all(self, rows: Tensor) -> Tensor:
        """Send row i of ``rows`` [world_size, n] to worker i: [world_size, n] by sender."""

    @abstractmethod
    def replicate(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        """``module`` with worker 0's weights, in a wrapper whose backwards average gradients.

        Where the module comes back as it is (:func:`bare`), its gradients are still to be averaged.

        Args:
            module: on its device.
            compress: let gradients travel as bfloat16.
        """

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every worker's ``value``, which must consist of JSON values, by rank."""
        text = json.dumps(value).encode()
        size = self.all_gather(torch.tensor(len(text), device=self.device))
        buffer = torch.zeros(int(size.max()), dtype=torch.uint8, device=self.device)
        buffer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self.all_gather(buffer).cpu().numpy()
        return [json.loads(row[:n].tobytes()) for row, n in zip(rows, size.tolist(), strict=True)]

    def take_communication_s(self) -> float:
        """Seconds that gradient buckets were on their way since the last call, added up.

        They overlap with the backward that produces the next bucket. Measured on the CPU only; 0
        elsewhere.
        """
        return 0.0

    def any(self, flag: bool) -> bool:
        """True on every worker if ``flag`` is true on at least one."""
        return bool(self.all_reduce_(torch.tensor([float(flag)], device=self.device)).item())


class LocalCommunicator(Communicator):
    """One process that talks to nobody."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, 1, device)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The tensor as it is."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[1, ...]."""
        return tensor[None]

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The tensor as it is."""
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """The value as it is."""
        return value

    def all_to_all(self, rows: Tensor) -> Tensor:
        """The rows as they are."""
        return rows

    def replicate(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        """The module as it is."""
        return module


class FakeCommunicator(LocalCommunicator):
    """For tests: worker ``rank`` of ``world_size``, all of whose peers hold the same tensors."""

    def __init__(self, rank: int, world_size: int, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cpu"))
        self.rank, self.world_size = rank, world_size

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """``world_size`` times the tensor."""
        return tensor.mul_(self.world_size)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``world_size`` copies."""
        return tensor[None].expand(self.world_size, *tensor.shape).clone()

    def all_to_all(self, rows: Tensor) -> Tensor:
        """``world_size`` copies of this worker's row."""
        return rows[self.rank].expand_as(rows).clone()


class TorchCommunicator(Communicator):
    """The default ``torch.distributed`` process group, which the launcher has initialized."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._communication_s = 0.0
        super().__init__(dist.get_rank(), dist.get_world_size(), device)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place."""
        with _range():
            self._dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[world_size, ...] by rank."""
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with _range():
            self._dist.all_gather(rows, tensor.contiguous())
        return torch.stack(rows)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Worker 0's values, in place."""
        plain = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
        sent = plain.contiguous()
        with _range():
            self._dist.broadcast(sent, src=0)
        if sent is not plain:
            plain.copy_(sent)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Worker 0's value, sent as JSON: nothing is unpickled."""
        text = json.dumps(value).encode() if self.is_main else b""
        size = self.broadcast_(torch.tensor([len(text)], device=self.device))
        buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return json.loads(self.broadcast_(buffer).cpu().numpy().tobytes())

    def all_to_all(self, rows: Tensor) -> Tensor:
        """[world_size, n] by sender."""
        received = torch.empty_like(rows)
        with _range():
            self._dist.all_to_all_single(received, rows.contiguous())
        return received

    def replicate(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        """``module`` in a DistributedDataParallel of its own; alone, as it is.

        One around both networks can't tell phases apart.
        """
        if self.world_size == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        replicated = DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        if self.device.type == "cpu" or compress:
            # A lambda, since torch refuses a hook whose annotations are strings.
            replicated.register_comm_hook(None, lambda _, bucket: self._mean(bucket, compress))
        return replicated

    def take_communication_s(self) -> float:
        """See :meth:`Communicator.take_communication_s`."""
        taken, self._communication_s = self._communication_s, 0.0
        return taken

    def _mean(self, bucket: GradBucket, compress: bool) -> Future[Tensor]:
        """The mean of a bucket over the workers, its time noted where clocks can tell it."""
        began = time.perf_counter()
        full = bucket.buffer()
        sent = full.div_(self.world_size)
        if compress:
            sent = sent.to(torch.bfloat16)

        def finish(reduced: Future[list[Tensor]]) -> Tensor:
            if self.device.type == "cpu":
                self._communication_s += time.perf_counter() - began
            (mean,) = reduced.value()
            return full.copy_(mean) if compress else mean

        with _range():  # in which it sets out; torch shows its way in a row of its own
            future: Future[Tensor] = (
                self._dist.all_reduce(sent, async_op=True).get_future().then(finish)
            )
        return future


def _range() -> AbstractContextManager[object]:
    """What a profile shows of communication."""
    return record_function("communication")


def without_reduction(module: nn.Module) -> AbstractContextManager[object]:
    """In this context, forward and backward of a replicated module add to ``.grad`` and no more."""
    from torch.nn.parallel import DistributedDataParallel

    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def bare(module: nn.Module) -> nn.Module:
    """The network in :meth:`Communicator.replicate`'s wrapper, whose use starts no reduction."""
    from torch.nn.parallel import DistributedDataParallel

    inner = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(inner, nn.Module)
    return inner
