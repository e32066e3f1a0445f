"""The kernels that a step launches, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

TOP = 20
_COPIES = ("Memcpy", "Memset")


def launched(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return the number of ``kernels`` of a step and ``busy_s``, their time; {} without CUDA."""
    if device.type != "cuda":
        return {}
    rows = [row for row in profiled(step, device, 1) if not row["name"].startswith(_COPIES)]
    return {
        "kernels": sum(row["count"] for row in rows),
        "busy_s": sum(row["seconds"] for row in rows),
    }


def top(step: Callable[[], object], device: torch.device, steps: int = 3) -> list[dict[str, Any]]:
    """Return the :data:`TOP` kernels by time, each with its ``share`` of the time of all.

    ``count`` and ``seconds`` are of one step. On a CPU, operators instead of kernels.
    """
    rows = profiled(step, device, steps)
    total = sum(row["seconds"] for row in rows)
    return [row | {"share": row["seconds"] / total} for row in rows[:TOP]]


def profiled(step: Callable[[], object], device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Return ``name``, ``count`` and ``seconds`` per step of every kernel, longest first."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if is_cuda:
            torch.cuda.synchronize(device)
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    rows = [
        {
            "name": event.key,
            "count": event.count / steps,
            "seconds": getattr(event, key) / 1e6 / steps,
        }
        for event in profiler.key_averages()
        if event.device_type.name == ("CUDA" if is_cuda else "CPU")
        and not event.is_user_annotation  # which spans kernels
        and getattr(event, key)
    ]
    return sorted(rows, key=lambda row: -row["seconds"])
