"""How often checkpoints are written."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from gatdist.common.reliability import young_s
from gatdist.config import Config
from gatdist.parallel.communicator import Communicator

# One failure per day is expected of a run of which nothing is known yet.
_PRIOR_S = 86_400.0
# What a failure may cost, however rare it is.
_MOST_S = 1_800.0
# Writing takes at most this share of the time, as it slows training on CPUs and uses the network.
_WRITING = 0.1
_KEPT_COSTS = 5


def mean_time_to_failure_s(attempts: int, trained_s: float) -> float:
    """Return the posterior mean of the time between failures, from those so far.

    Each start of a run but the first followed a failure, or may have. With an exponential prior of
    the rate, whose mean is one per day, and n failures in time T, the mean rate is
    (1 + n) / (1 day + T).
    """
    return (_PRIOR_S + trained_s) / max(1, attempts)


def best_interval_s(stop_s: float, write_s: float, mean_time_s: float) -> float:
    """Return Young's interval within bounds.

    Args:
        stop_s: Seconds for which a checkpoint stops training.
        write_s: Seconds for which it is then written in the background.
        mean_time_s: Mean time between failures after which a checkpoint is needed.
    """
    return max(min(young_s(stop_s, mean_time_s), _MOST_S), write_s / _WRITING)


def interval_samples(interval_s: float, samples_per_s: float, log_every_samples: int) -> int:
    """Return the largest 2^k log intervals that take at most ``interval_s``, at least one.

    Of two such numbers one divides the other, so that a change does not lengthen an interval that
    has begun beyond the longer of the two.
    """
    log_intervals = interval_s * samples_per_s / log_every_samples
    return log_every_samples * 2 ** max(0, math.floor(math.log2(max(1.0, log_intervals))))


class CheckpointInterval:
    """The number of samples between two checkpoints, as configured or chosen during the run.

    Attributes:
        is_chosen: Whether worker 0 chooses it.
        samples: The interval, identical on every rank; a multiple of the log interval if chosen.
    """

    def __init__(self, config: Config) -> None:
        every = config.run.checkpoint_every_samples
        self.is_chosen = every == "auto"
        # The first checkpoint shows what one costs.
        self._log_every_samples = config.log_every_samples
        self.samples = self._log_every_samples if every == "auto" else every
        self._stops_s = deque[float](maxlen=_KEPT_COSTS)
        self._write_s = 0.0
        self._writing_since: float | None = None

    @contextmanager
    def stop(self) -> Iterator[None]:
        """Measure the time for which a checkpoint stops training."""
        began = time.perf_counter()
        yield
        self._stops_s.append(time.perf_counter() - began)

    def writes(self) -> float:
        """Take note that a checkpoint is being written from now on, and return the time."""
        self._writing_since = time.perf_counter()
        return self._writing_since

    def written(self, since: float) -> None:
        """Take note, in any thread, that the one that has been written ``since`` is complete."""
        self._write_s = time.perf_counter() - since
        if self._writing_since == since:  # else the next one has begun
            self._writing_since = None

    def choose(
        self, comm: Communicator, samples_per_s: float, attempts: int, trained_s: float
    ) -> None:
        """Let worker 0 choose the interval for all; called together at a log step."""
        chosen = self.samples
        if comm.is_main and self._stops_s:
            write_s, since = self._write_s, self._writing_since
            if since is not None:
                write_s = max(write_s, time.perf_counter() - since)
            mean_time_s = mean_time_to_failure_s(attempts, trained_s)
            best_s = best_interval_s(median(self._stops_s), write_s, mean_time_s)
            chosen = interval_samples(best_s, samples_per_s, self._log_every_samples)
        self.samples = comm.broadcast_object(chosen)

    def take_over(self, samples: int | None) -> None:
        """Continue with the interval of a checkpoint or of other workers, if one is chosen.

        That of a checkpoint may be no multiple of the log interval any more; then it is ignored.
        """
        if self.is_chosen and samples and samples % self._log_every_samples == 0:
            self.samples = samples
