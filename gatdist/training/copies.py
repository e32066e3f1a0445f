"""Copies of batches to a GPU, beside the step that it is computing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # a machine that only benchmarks steps has no fsspec
    from gatdist.data.loader import Batch


class Copies:
    """Copies batches to a device.

    On a GPU, copies run on a stream of their own, so that one does not wait for the steps before
    it. The host waits for the copy of the previous batch, whose memory may then be reused: at most
    one batch is being copied. It does not wait for steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device) if device.type == "cuda" else None
        self._pending: tuple[torch.Event, Batch] | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, for use on the current stream."""
        if self._stream is None:
            return batch
        if self._pending is not None:
            self._pending[0].synchronize()
        with self._stream:
            copied = replace(
                batch,
                samples=self._copy(batch.samples),
                labels=None if batch.labels is None else self._copy(batch.labels),
                positions=self._copy(batch.positions),
            )
            done = self._stream.record_event()
        self._pending = done, batch
        current = torch.accelerator.current_stream(self._device)
        current.wait_event(done)
        for tensor in (copied.samples, copied.labels, copied.positions):
            if tensor is not None:  # its memory belongs to the other stream
                tensor.record_stream(current)
        return copied

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
