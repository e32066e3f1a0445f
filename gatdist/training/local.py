"""Run the training loop in this process."""

from __future__ import annotations

from typing import Any

import torch

from gatdist.common.numerics import torch_threads
from gatdist.config import Config
from gatdist.monitor.console import Console
from gatdist.parallel.communicator import Communicator
from gatdist.storage import Store
from gatdist.training.interrupts import Interrupts
from gatdist.training.loop import run
from gatdist.training.progress import Progress


def run_in_process(
    config: Config,
    run_dir: str,
    comm: Communicator,
    console: Console | None,
    interrupts: Interrupts,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, and stop after a checkpoint when ``interrupts`` has a signal.

    Args:
        config: of the run.
        run_dir: its folder, a URL or absolute path.
        comm: this process, or the group that it is part of.
        console: shows progress on rank 0.
        interrupts: requests the end of training.
        threads: of torch's CPU kernels; None: as many as usual. Other numbers round differently.
        progress: updated with this process's position.

    Returns:
        See :func:`gatdist.training.loop.run`.
    """
    progress = progress or Progress()
    interrupts.is_saved = lambda: progress.is_saved
    interrupts.is_ending = lambda: progress.is_ending

    def should_stop() -> bool:
        interrupts.renew()  # a library that a user's network calls may have replaced the handlers
        return interrupts.requested()

    with torch_threads(threads or torch.get_num_threads()):
        return run(
            config,
            comm,
            Store(run_dir, config.run.storage_options),
            should_stop=should_stop,
            emit=console.event if console else lambda kind, fields: None,
            progress=progress,
        )
