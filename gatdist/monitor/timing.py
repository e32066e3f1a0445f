"""Time each phase of a step without synchronizing with the device, and find stragglers."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch.profiler import record_function

_COMMUNICATION, _STEP = "time/communication_s", "time/step_s"
_MIN_SHARE = 0.2  # of a step, by which a straggler is late


class PhaseTimer:
    """Times the phases of a step: ``with timer("discriminator"): ...``.

    On the CPU a phase is wall time. On CUDA it is the time between two events on the current
    stream, read only in :meth:`collect`; around a wait of the host (for data, say) it is the idle
    time of the device, near zero while earlier work keeps it busy. Phases of different names may
    nest. ``on_enter`` is called with the name of each phase, once its clock has started. With
    ``makes_ranges``, phases are also ranges in a profile.
    """

    def __init__(
        self, device: torch.device, on_enter: Callable[[str], None] = lambda name: None
    ) -> None:
        self._on_enter = on_enter
        self.makes_ranges = False
        self._phase_type = _CudaPhase if device.type == "cuda" else _Phase
        self._phases: dict[str, _Phase] = {}

    def __call__(self, name: str) -> AbstractContextManager[object]:
        """Begin phase ``name``; return its context. A step may enter it several times."""
        if name not in self._phases:
            self._phases[name] = self._phase_type()
        phase = self._phases[name]
        phase.begin()
        self._on_enter(name)
        return _in_range(phase, name) if self.makes_ranges else phase

    def collect(self, num_steps: int = 1) -> dict[str, float]:
        """Return mean seconds per step since the last call, by ``time/<phase>_s``.

        Synchronizes with the device. ``num_steps`` is the number of steps since the last call (≥
        1).
        """
        phases = sorted(self._phases.items())
        return {f"time/{name}_s": phase.take() / num_steps for name, phase in phases}


@contextmanager
def _in_range(phase: _Phase, name: str) -> Iterator[None]:
    with record_function(name), phase:
        yield


class _Phase:
    def __init__(self) -> None:
        self._seconds = 0.0
        self._start = 0.0

    def begin(self) -> None:
        self._start = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._seconds += time.perf_counter() - self._start

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _CudaPhase(_Phase):
    def __init__(self) -> None:
        super().__init__()
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        self._pairs.append(self._free.pop() if self._free else (_event(), _event()))
        self._pairs[-1][0].record()

    def __exit__(self, *exception: object) -> None:
        self._pairs[-1][1].record()

    def take(self) -> float:
        if self._pairs:
            self._pairs[-1][1].synchronize()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in self._pairs)
        self._free += self._pairs
        self._pairs = []
        return milliseconds / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class WorkerTimes(NamedTuple):
    """Mean seconds per step of the worker on ``host``, by tag, and its samples per step.

    ``time/communication_s`` includes waiting for others.
    """

    host: str
    seconds: Mapping[str, float]
    samples: int = 1

    @property
    def busy_s(self) -> float:
        return max(self.seconds[_STEP] - self.seconds[_COMMUNICATION], 0.0)


@dataclass(frozen=True)
class Straggler:
    """A slow worker, and the phase in which it loses most time."""

    rank: int
    phase: str
    message: str


def find_stragglers(times: Sequence[WorkerTimes], factor: float) -> list[Straggler]:
    """Return the workers that take more than ``factor`` times the others' median.

    In a synchronized step all workers take as long as the slowest; the others spend the difference
    in communication. So their times without communication are compared; of a worker with more
    samples, as much more is expected. A slow link looks the same: its sender receives early what it
    needs, and the others wait.
    """
    if len(times) < 2:
        return []
    usual: dict[int, _Others] = {}  # by number of samples, of which there are few
    phases: dict[str, _Others] = {}
    found = []
    for rank, mine in enumerate(times):
        if mine.samples not in usual:
            usual[mine.samples] = _Others(
                one.busy_s * max(1.0, mine.samples / one.samples) for one in times
            )
        usual_s = usual[mine.samples].median(mine.busy_s)
        late_s = mine.busy_s - usual_s
        if mine.busy_s <= factor * usual_s or late_s <= _MIN_SHARE * mine.seconds[_STEP]:
            continue
        for tag in mine.seconds.keys() - phases.keys():
            phases[tag] = _Others(one.seconds.get(tag, 0.0) for one in times)
        phase = _slowest_phase(mine, phases)
        message = (
            f"worker {rank} on {mine.host} is a straggler: {mine.busy_s:.3g} s per step without "
            f"communication, the others {usual_s:.3g} s; phase {phase!r} loses most. "
            "gatdist doctor checks its host and network"
        )
        found.append(Straggler(rank, phase, message))
    return found


class _Others:
    """Values of all workers, sorted once, for the medians of all but one."""

    def __init__(self, values: Iterable[float]) -> None:
        self._sorted = sorted(values)

    def median(self, mine: float) -> float:
        """Return the median of the values without one that equals ``mine``."""
        place, last = bisect_left(self._sorted, mine), len(self._sorted) - 2
        low, high = (self._sorted[i + (i >= place)] for i in (last // 2, last - last // 2))
        return (low + high) / 2


def _slowest_phase(mine: WorkerTimes, others: Mapping[str, _Others]) -> str:
    """The phase in which a worker is furthest behind.

    If the others wait for it within the same phase, none is, and its own longest phase is returned.
    """
    phases = [tag for tag in mine.seconds if tag not in (_COMMUNICATION, _STEP)]
    late = {tag: mine.seconds[tag] - others[tag].median(mine.seconds[tag]) for tag in phases}
    tag = max(phases, key=lambda tag: late[tag])
    if late[tag] <= _MIN_SHARE * mine.seconds[_STEP]:
        tag = max(phases, key=lambda tag: mine.seconds[tag])
    return tag.removeprefix("time/").removesuffix("_s")
