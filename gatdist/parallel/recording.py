"""CUDA graphs of functions that communicate: several graphs, with the collectives between them."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

from gatdist.parallel.communicator import Communicator

T = TypeVar("T")


class Recorder(ABC):
    """Record what functions compute on the device, to replay it without the host."""

    @abstractmethod
    def warm_up(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the stream of the recordings."""

    @abstractmethod
    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record ``function``, which computes nothing yet.

        Returns:
            What ``function`` returned, tensors that each replay overwrites; and the replay.

        Raises:
            RuntimeError: ``function`` does what can't be recorded.
        """

    @abstractmethod
    def outside(self, function: Callable[[], object]) -> None:
        """Call ``function`` at this point of each replay; now, if nothing is being recorded."""


class CudaRecorder(Recorder):
    """Record CUDA graphs on a stream of their own, all in one memory pool.

    They can share it since no two run at once, and only what the functions returned is read after
    a replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._pieces: list[Callable[[], object]] | None = None
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], T]) -> T:
        with self._on_stream():
            return function()

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        # No memory may be freed within a recording.
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        pieces = self._pieces = []
        with self._on_stream():
            self._begin()
            try:
                value = function()
            except BaseException:
                with suppress(RuntimeError):  # would hide the cause
                    self._graph.capture_end()
                raise
            finally:
                self._pieces = None
            self._graph.capture_end()
            pieces.append(self._graph.replay)

        def replay() -> None:
            for piece in pieces:
                piece()

        return value, replay

    def outside(self, function: Callable[[], object]) -> None:
        if self._pieces is None:
            function()
            return
        self._graph.capture_end()
        self._pieces += [self._graph.replay, function]
        self._begin()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as the loader's, may use CUDA meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


class OutsideCommunicator(Communicator):
    """A communicator whose collectives, those of ``inner``, stay outside of recordings."""

    def __init__(self, inner: Communicator, recorder: Recorder) -> None:
        super().__init__(inner.rank, inner.world_size, inner.device)
        self._inner, self._recorder = inner, recorder

    def follow(self) -> None:
        super().__init__(self._inner.rank, self._inner.world_size, self._inner.device)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        self._recorder.outside(lambda: self._inner.all_reduce_(tensor))
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        rows = tensor.new_empty(self.world_size, *tensor.shape)
        self._recorder.outside(lambda: rows.copy_(self._inner.all_gather(tensor)))
        return rows

    def all_to_all(self, rows: Tensor) -> Tensor:
        received = torch.empty_like(rows)
        self._recorder.outside(lambda: received.copy_(self._inner.all_to_all(rows)))
        return received

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        self._recorder.outside(lambda: self._inner.broadcast_(tensor, source))
        return tensor

    def broadcast_object(self, value: object, source: int = 0) -> object:
        return self._inner.broadcast_object(value, source)

    def wrapped(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        return module


def cuda_recorder(device: torch.device) -> Recorder | None:
    """Return a recorder for ``device``, or None if it has no CUDA graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None
