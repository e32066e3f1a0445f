"""Devices by name."""

from __future__ import annotations

from typing import Any

from gatdist.common.errors import ConfigError


def default_device() -> Any:
    """Return the first CUDA device if there is one, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_named(name: str) -> Any:
    """Return a device, "" being the default one. Raises ConfigError if it can't be used."""
    import torch

    if not name:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0].rstrip(".")
        raise ConfigError("--device", f"can't be used ({problem})", value=name) from None
    return device
