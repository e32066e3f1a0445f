"""What follows from a failure: a policy without Ray, which returns a decision."""

from __future__ import annotations

from dataclasses import dataclass

from gatdist.common.errors import GatdistError, RetryableError

_FIRST_DELAY_S, _MAX_DELAY_S = 1.0, 30.0


@dataclass(frozen=True)
class RetryDecision:
    """What to do after a failure.

    Attributes:
        goes_on: whether to start the workers again.
        delay_s: how long to wait before.
        why_not: where it does not go on, and that is not clear from the failure itself.
    """

    goes_on: bool
    delay_s: float = 0.0
    why_not: str = ""


class Recovery:
    """Starts again after what may pass, as long as the run gets on.

    Args:
        max_failures: so many failures in a row without a new checkpoint between them are borne.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._in_a_row = 0
        self._reached = -1

    def judge(self, error: GatdistError, reached: int) -> RetryDecision:
        """What to do.

        Args:
            error: that ended the workers.
            reached: samples seen by the newest checkpoint.
        """
        if not isinstance(error, RetryableError):
            return RetryDecision(False)
        if reached > self._reached:
            self._in_a_row, self._reached = 0, reached
        self._in_a_row += 1
        if self._in_a_row > self._max_failures:
            times = f"{self._in_a_row} times in a row without a new checkpoint between them"
            return RetryDecision(False, why_not=times if self._max_failures else "")
        # The first time at once: most often a host was taken away.
        doublings = self._in_a_row - 2
        delay_s = 0.0 if doublings < 0 else min(_FIRST_DELAY_S * 2**doublings, _MAX_DELAY_S)
        return RetryDecision(True, delay_s)
