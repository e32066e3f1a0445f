"""Types of physical figures: a range each, and what was mixed up where one lies outside.

The bounds are far from anything that exists.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from gatdist.common.errors import ConfigError


def between(low: float, high: float, unit: str, hint: str) -> AfterValidator:
    """From ``low`` to ``high``, both among it."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise PydanticCustomError(
                "unit", f"must be {_range(low, high)} {unit}" + (f". {hint}" if hint else "")
            )
        return value

    return AfterValidator(check)


def share(low: float | None = None, high: float = 1.0) -> AfterValidator:
    """Above 0 (from ``low`` on, where it is given) and at most ``high``."""

    def check(value: float) -> float:
        below = value <= 0 if low is None else value < low
        if below or value > high:
            hint = f". {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
            from_ = "above 0" if low is None else f"at least {low:g}"
            rule = f"must be a share, {from_} and at most {high:g}{hint}"
            raise PydanticCustomError("share", rule)
        return value

    return AfterValidator(check)


def refuse_both(section: str, it: BaseModel, one: str, other: str) -> None:
    """Raise ConfigError where two keys of a section are given that say the same thing."""
    if getattr(it, one) is not None and getattr(it, other) is not None:
        raise ConfigError(
            f"{section}.{other}",
            f"can't stand beside {section}.{one}",
            value=getattr(it, other),
            hint="Keep one of them",
        )


def _range(low: float, high: float) -> str:
    return f"from {low:g} to {high:g}"


Workers = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, between(0, 86_400, "seconds", "Were milliseconds given?")]
StepSeconds = Annotated[float, between(0, 60, "seconds", "Were milliseconds given?")]
Latency = Annotated[
    float, between(0, 0.5, "seconds", "5 µs are 5e-6, and 5 ms are 0.005: give seconds")
]
Hours = Annotated[
    float, between(0.001, 1e8, "hours", "Give hours, not seconds or years; leave it out for never")
]
BytesPerSecond = Annotated[
    float, between(1e4, 1e12, "bytes per second", "25 Gbit/s are 25e9 bits, or 3.125e9 bytes")
]
BitsPerSecond = Annotated[
    float, between(1e5, 8e12, "bits per second", "25 Gbit/s are 25e9: give bits, not gigabits")
]
# Links of a host reach further than networks: NVLink's fifth generation has 1.8e12.
HostBytesPerSecond = Annotated[float, between(1e6, 4e12, "bytes per second", "600 GB/s are 600e9")]
FlopPerSecond = Annotated[
    float,
    between(1e8, 1e17, "floating-point operations per second", "312 TFLOP/s are 312e12"),
]
Flop = Annotated[float, between(1, 1e18, "floating-point operations", "1 GFLOP is 1e9")]
Bytes = Annotated[float, between(1, 1e15, "bytes", "1 GB is 1e9")]
Usd = Annotated[float, between(0, 1e4, "USD an hour", "Give dollars of one machine and one hour")]
Share = Annotated[float, share()]
