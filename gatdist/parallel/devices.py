"""What the host may do without waiting for the device that computes."""

from __future__ import annotations

from torch import Tensor


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read the tensor's numbers without waiting."""
    return tensor.device.type == "cpu"
