"""Values that change with training progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError


def fits_int64(value: int) -> int:
    """Refuse an integer that no int64 tensor holds."""
    if value >= 2**63:
        raise PydanticCustomError("too_large", "must be below 2**63")
    return value


NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(fits_int64)]
# What single precision holds, in which steps on a device read the values.
SingleFloat = Annotated[float, Field(gt=-(2.0**127), lt=2.0**127, allow_inf_nan=False)]


class Schedule(BaseModel):
    """A value as a function of ``samples_seen``. A plain number is a constant.

    It goes from ``start`` to ``end`` over ``samples`` samples, and stays there. For example,
    ``learning_rate = { start = 2e-4, end = 5e-5, samples = 20_000_000 }``. It does not depend on
    ``run.total_samples``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    start: SingleFloat
    """Value before the change."""
    end: SingleFloat
    """Value after the change. May be omitted together with ``samples`` for a constant."""
    samples: NonNegativeInt
    """Length of the change in samples. 0 is a jump."""
    shape: Literal["cosine", "linear", "exponential"] = "cosine"
    """Half a cosine, a straight line, or a constant factor per sample."""
    delay: NonNegativeInt = 0
    """Samples before the change begins."""
    warmup: NonNegativeInt = 0
    """Samples over which the value first rises linearly from 0."""

    @classmethod
    def constant(cls, value: float) -> Self:
        return cls(start=value, end=value, samples=0)

    @property
    def is_constant(self) -> bool:
        return self.start == self.end and not self.warmup

    def at(self, samples_seen: int) -> float:
        """Return the value of the step after ``samples_seen`` samples."""
        value = self._change(samples_seen - self.delay)
        if samples_seen < self.warmup:
            value *= (samples_seen + 1) / self.warmup
        return value

    def _change(self, since: int) -> float:
        if since >= self.samples:
            return self.end if since >= 0 else self.start
        if since <= 0:
            return self.start
        done = since / self.samples
        if self.shape == "exponential":
            return float(self.start ** (1 - done) * self.end**done)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + done * (self.end - self.start)

    @model_validator(mode="after")
    def _is_defined(self) -> Self:
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            rule = "start and end must be above 0 with the shape 'exponential'"
            raise PydanticCustomError("schedule", rule)
        return self

    @model_serializer(mode="wrap")
    def _plain(self, serialize: Callable[[Self], dict[str, Any]]) -> Any:
        return self.start if self.is_constant else serialize(self)


def _number_or_table(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"start": value}
    if not isinstance(value, dict | Schedule):
        rule = "must be a number, or a table with start, end and samples"
        raise PydanticCustomError("schedule", rule)
    if isinstance(value, dict) and "start" in value and not value.keys() & {"end", "samples"}:
        return {**value, "end": value["start"], "samples": 0}
    return value


def _within(rule: str, fits: Callable[[Schedule], bool]) -> AfterValidator:
    def check(schedule: Schedule) -> Schedule:
        if not fits(schedule):
            raise PydanticCustomError("schedule", rule)
        return schedule

    return AfterValidator(check)


def _lowest(schedule: Schedule) -> float:
    return min(schedule.start, schedule.end)


def _highest(schedule: Schedule) -> float:
    return max(schedule.start, schedule.end)


_Any = Annotated[Schedule, BeforeValidator(_number_or_table)]
NonNegativeSchedule = Annotated[_Any, _within("must be at least 0", lambda s: _lowest(s) >= 0)]
PositiveSchedule = Annotated[
    NonNegativeSchedule, _within("must be above 0", lambda s: _highest(s) > 0)
]
DecayRateSchedule = Annotated[
    NonNegativeSchedule, _within("must be below 1", lambda s: _highest(s) < 1)
]
