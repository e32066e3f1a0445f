"""Communication as an argument: one process, or a torch process group."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.profiler import record_function

from gatdist.common.errors import GatdistError, rebuilt
from gatdist.parallel.in_flight import CudaClock, HostClock, InFlight

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


class Communicator(ABC):
    """The workers of a run, seen from one of them, which computes on ``device``."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the worker that writes."""
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
    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite ``tensor`` with that of worker ``source``."""

    @abstractmethod
    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Return the ``value`` of worker ``source``, which must consist of JSON values."""

    @abstractmethod
    def all_to_all(self, rows: Tensor) -> Tensor:
        """Send row i of ``rows`` [world_size, n] to worker i: [world_size, n] by sender."""

    def replicate(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        """Return ``module`` with worker 0's weights, wrapped so that backwards average gradients.

        If it is returned unwrapped (:func:`bare`), its gradients are still to be averaged.
        ``compress`` sends them as bfloat16.
        """
        return self.wrapped(self.broadcast_module_(module), compress=compress)

    @abstractmethod
    def wrapped(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        """Return ``module``, which is equal on all workers, as :meth:`replicate` does."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every worker's ``value`` by rank; it must consist of JSON values."""
        text = json.dumps(value).encode()
        size = self.all_gather(torch.tensor(len(text), device=self.device))
        buffer = torch.zeros(int(size.max()), dtype=torch.uint8, device=self.device)
        buffer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self.all_gather(buffer).cpu().numpy()
        return [json.loads(row[:n].tobytes()) for row, n in zip(rows, size.tolist(), strict=True)]

    def of_main(self, compute: Callable[[], Any]) -> Any:
        """Return on every worker what ``compute`` returns on worker 0, the only one to call it.

        The value must consist of JSON values. Its GatdistError is raised on every worker.
        """
        said: dict[str, Any] = {}
        if self.is_main:
            try:
                said = {"value": compute()}
            except GatdistError as error:
                self.broadcast_object({"error": [type(error).__name__, str(error)]})
                raise
        said = self.broadcast_object(said)
        if "error" in said:
            raise rebuilt(*said["error"])
        return said["value"]

    def of_each(self, compute: Callable[[], Any]) -> list[Any]:
        """Return on every worker what ``compute`` returns on each of them, by rank.

        The values must consist of JSON values. If it raises a GatdistError on some workers, that of
        the lowest rank is raised on every worker.
        """
        mine: GatdistError | None = None
        try:
            said = {"value": compute()}
        except GatdistError as error:
            mine, said = error, {"error": [type(error).__name__, str(error)]}
        gathered = self.all_gather_object(said)
        for rank, each in enumerate(gathered):
            if "error" in each:
                raise mine if mine and rank == self.rank else rebuilt(*each["error"])
        return [each["value"] for each in gathered]

    def take_communication_s(self) -> float:
        """Return and reset the seconds with gradients in flight.

        Those are buckets, which overlap with the backward of the next one, and the collectives of
        :class:`~gatdist.parallel.reduction.CanonicalReduction`. On CUDA they are measured on the
        device, and this call waits for it. Other collectives are not counted: a worker with a slow
        link receives gradients early, and waits for the others in the next collective.
        """
        return 0.0

    def any(self, flag: bool) -> bool:
        """Return true on every worker if ``flag`` is true on any."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Return on every worker, for each flag, whether it is true on any."""
        sums = self.all_reduce_(torch.tensor([float(flag) for flag in flags], device=self.device))
        return [total > 0 for total in sums.tolist()]

    def follow(self) -> None:  # noqa: B027
        """Take over changes of the workers by the communicator that this one uses."""


class LocalCommunicator(Communicator):
    """A single process."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, 1, device)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        return tensor

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return value

    def all_to_all(self, rows: Tensor) -> Tensor:
        return rows

    def wrapped(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        return module


class TorchCommunicator(Communicator):
    """The default ``torch.distributed`` process group, which the launcher has initialized."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._in_flight = InFlight(CudaClock() if device.type == "cuda" else HostClock())
        # torch 2.13 has renamed it.
        self._all_gather: Callable[[Tensor, Tensor], Any] = (
            getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        )
        super().__init__(dist.get_rank(), dist.get_world_size(), device)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        with _range():
            self._dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        rows = tensor.new_empty(self.world_size, *tensor.shape)
        with _range(), self._measured():
            self._all_gather(rows.view(-1), tensor.contiguous().view(-1))
        return rows

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        plain = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
        sent = plain.contiguous()
        with _range():
            self._dist.broadcast(sent, src=source)
        if sent is not plain:
            plain.copy_(sent)
        return tensor

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        # As JSON: nothing is unpickled.
        text = json.dumps(value).encode() if self.rank == source else b""
        size = self.broadcast_(torch.tensor([len(text)], device=self.device), source)
        buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return json.loads(self.broadcast_(buffer, source).cpu().numpy().tobytes())

    def all_to_all(self, rows: Tensor) -> Tensor:
        received = torch.empty_like(rows)
        with _range(), self._measured():
            self._dist.all_to_all_single(received, rows.contiguous())
        return received

    def wrapped(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        # One wrapper per network: a common one could not separate the phases.
        if self.world_size == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        replicated = DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            init_sync=False,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        # A lambda, since torch refuses a hook whose annotations are strings.
        replicated.register_comm_hook(None, lambda _, bucket: self._mean(bucket, compress))
        return replicated

    def take_communication_s(self) -> float:
        return self._in_flight.take_s()

    def _measured(self) -> AbstractContextManager[object]:
        return self._in_flight() if self.world_size > 1 else nullcontext()

    def _mean(self, bucket: GradBucket, compress: bool) -> Future[Tensor]:
        """Average a bucket over the workers, and measure how long it is in flight."""
        interval = self._in_flight.begin()
        full = bucket.buffer()
        sent = full.div_(self.world_size)
        if compress:
            sent = sent.to(torch.bfloat16)

        def finish(reduced: Future[list[Tensor]]) -> Tensor:
            interval.end()  # on CUDA, on a stream that waits for the collective
            (mean,) = reduced.value()
            return full.copy_(mean) if compress else mean

        with _range():
            future: Future[Tensor] = (
                self._dist.all_reduce(sent, async_op=True).get_future().then(finish)
            )
        return future


def _range() -> AbstractContextManager[object]:
    return record_function("communication")


class Replica(nn.Module):
    """A network in the wrapper of the present workers, which another one may replace."""

    def __init__(self, network: nn.Module, wrapper: nn.Module) -> None:
        super().__init__()
        self.module = network
        self.use(wrapper)

    def use(self, wrapper: nn.Module) -> None:
        """Compute in ``wrapper`` of the same network from now on."""
        self.__dict__["wrapper"] = wrapper  # not a second submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["wrapper"](*args, **kwargs)


def without_reduction(module: nn.Module) -> AbstractContextManager[object]:
    """Let backwards of a replicated module only add to ``.grad`` in this context."""
    from torch.nn.parallel import DistributedDataParallel

    module = module.__dict__["wrapper"] if isinstance(module, Replica) else module
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def bare(module: nn.Module) -> nn.Module:
    """Return the network inside :meth:`Communicator.replicate`'s wrapper."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, (Replica, DistributedDataParallel)):
        module = module.module
    return module
