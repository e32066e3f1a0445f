"""How long each phase of a step takes, without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

import torch
from torch.profiler import record_function


class PhaseTimer:
    """Seconds that each phase of a step takes: ``with timer("discriminator"): ...``.

    On the CPU a phase is wall time. On CUDA it is the time between two events on the current
    stream, read only in :meth:`collect`; around a wait of the host (for data, say) that is how long
    the device stood idle for it, and next to nothing while earlier work still kept it busy. Phases
    of different names may nest.

    Args:
        device: where the phases compute.
        on_enter: called with the name of each phase, once its clock has started.

    Attributes:
        makes_ranges: whether phases are ranges in a profile, too.
    """

    def __init__(
        self, device: torch.device, on_enter: Callable[[str], None] = lambda name: None
    ) -> None:
        self._on_enter = on_enter
        self.makes_ranges = False
        self._phase_type = _CudaPhase if device.type == "cuda" else _Phase
        self._phases: dict[str, _Phase] = {}

    def __call__(self, name: str) -> AbstractContextManager[object]:
        """The context in which phase ``name``, which begins now, is timed.

        A step may enter it several times.
        """
        if name not in self._phases:
            self._phases[name] = self._phase_type()
        phase = self._phases[name]
        phase.begin()
        self._on_enter(name)
        return _in_range(phase, name) if self.makes_ranges else phase

    def collect(self, num_steps: int = 1) -> dict[str, float]:
        """Mean seconds a step since the last call, by ``time/<phase>_s``. Waits for the device.

        Args:
            num_steps: how many steps were made since then (≥ 1).
        """
        phases = sorted(self._phases.items())
        return {f"time/{name}_s": phase.take() / num_steps for name, phase in phases}


@contextmanager
def _in_range(phase: _Phase, name: str) -> Iterator[None]:
    with record_function(name), phase:
        yield


class _Phase:
    """One name's wall time."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._start = 0.0

    def begin(self) -> None:
        """Its clock starts."""
        self._start = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._seconds += time.perf_counter() - self._start

    def take(self) -> float:
        """Seconds in all; starts afresh."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _CudaPhase(_Phase):
    """One name's pairs of events. Events that were read are used again."""

    def __init__(self) -> None:
        super().__init__()
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Its first event is recorded."""
        self._pairs.append(self._free.pop() if self._free else (_event(), _event()))
        self._pairs[-1][0].record()

    def __exit__(self, *exception: object) -> None:
        self._pairs[-1][1].record()

    def take(self) -> float:
        """Seconds in all; starts afresh."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in self._pairs)
        self._free += self._pairs
        self._pairs = []
        return milliseconds / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
