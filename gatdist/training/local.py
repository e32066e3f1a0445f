"""Trains in this process, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gatdist.config import Config
from gatdist.monitor.console import Console
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.storage import Store
from gatdist.training.interrupts import Interrupts
from gatdist.training.loop import run
from gatdist.training.progress import Progress


def run_here(
    config: Config, run_dir: str, console: Console | None, interrupts: Interrupts
) -> dict[str, Any]:
    """Train with the local communicator on the first CUDA device, else the CPU.

    A canonical run has as many threads as a worker (``cluster.cpus_per_worker``): more would round
    differently. Ctrl-C or SIGTERM lets the loop write a checkpoint and end; a second one leaves at
    once.

    Args:
        config: of the run.
        run_dir: its folder, a URL or absolute path.
        console: shows progress; None shows nothing.
        interrupts: asks for the end.

    Returns:
        See :func:`gatdist.training.loop.run`.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    emit = console.event if console else lambda kind, fields: None
    progress = Progress()
    interrupts.is_saved = lambda: progress.is_saved
    interrupts.is_ending = lambda: progress.is_ending

    def should_stop() -> bool:
        interrupts.renew()  # a library that a user's network calls may have taken the signals
        return interrupts.requested()

    with _threads(config):
        return run(
            config,
            LocalCommunicator(device),
            Store(run_dir, config.run.storage_options),
            should_stop=should_stop,
            emit=emit,
            progress=progress,
        )


@contextmanager
def _threads(config: Config) -> Iterator[None]:
    usual = torch.get_num_threads()
    if config.run.reduction == "canonical":
        torch.set_num_threads(config.cluster.cpus_per_worker)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
