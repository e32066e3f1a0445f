"""Memory of a step as counted by torch's allocator, which is the same in every run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

from gatdist.bench.cases import Case


class Memory(NamedTuple):
    """Memory kept from step to step, and the additional peak of a step, gradients included."""

    state_bytes: int
    peak_bytes: int


def measure_memory(build: Callable[[], Case]) -> Memory:
    """Count the CPU allocations of two steps, since gradients may last into the second."""
    built: list[Case] = []

    def start() -> None:
        built.append(build())
        built[0].run(1)
        built[0].release_gradients()

    state_bytes, _ = _allocated(start)
    _, peak_bytes = _allocated(lambda: built[0].run(1))
    return Memory(state_bytes, peak_bytes)


def _allocated(function: Callable[[], object]) -> tuple[int, int]:
    gc.collect()  # so that earlier garbage is not freed meanwhile
    with _quiet_standard_error():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        kineto = profiler.profiler
        assert kineto is not None
        assert kineto.kineto_results is not None
        events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    levels = list(accumulate(changes, initial=0))
    return levels[-1], max(levels)


@contextmanager
def _quiet_standard_error() -> Iterator[None]:
    """Some builds of torch's profiler print two lines from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
