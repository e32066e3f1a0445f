"""What the host may do without waiting for the device that computes, and when that is broken."""

from __future__ import annotations

import torch
from torch import Tensor


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read the tensor's numbers without waiting."""
    return tensor.device.type == "cpu"


def is_broken_device(error: BaseException) -> bool:
    """Whether the device itself failed; one that is only too small would fail again."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )
