"""Types of physical figures, each with a range that hints at mixed-up units."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError


def between(low: float, high: float, unit: str, hint: str = "") -> AfterValidator:
    """Validate that a value is in [low, high]; the hint names what may have been mixed up."""

    def check(value: float) -> float:
        if not low <= value <= high:
            rule = f"must be from {low:g} to {high:g} {unit}"
            raise PydanticCustomError("unit", f"{rule}. {hint}" if hint else rule)
        return value

    return AfterValidator(check)


def share(low: float | None = None, high: float = 1.0) -> AfterValidator:
    """Validate that a value is above 0 (or at least ``low``, if given) and at most ``high``."""

    def check(value: float) -> float:
        below = value <= 0 if low is None else value < low
        if below or value > high:
            hint = f". {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
            least = "above 0" if low is None else f"at least {low:g}"
            rule = f"must be a share, {least} and at most {high:g}{hint}"
            raise PydanticCustomError("share", rule)
        return value

    return AfterValidator(check)


# Bounds are far from any existing hardware.
Workers = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, between(0, 86_400, "seconds", "Were milliseconds given?")]
StepSeconds = Annotated[float, between(0, 60, "seconds", "Were milliseconds given?")]
LongSeconds = Annotated[float, between(0, 1e7, "seconds")]
SecondsPer1000 = Annotated[float, between(1e-7, 1e7, "seconds", "Give seconds for 1,000 samples")]
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
# Within a host links are faster than networks: NVLink's fifth generation has 1.8e12.
HostBytesPerSecond = Annotated[float, between(1e6, 4e12, "bytes per second", "600 GB/s are 600e9")]
FlopPerSecond = Annotated[
    float, between(1e8, 1e17, "floating-point operations per second", "312 TFLOP/s are 312e12")
]
Flop = Annotated[float, between(1, 1e18, "floating-point operations", "1 GFLOP is 1e9")]
Bytes = Annotated[float, between(1, 1e15, "bytes", "1 GB is 1e9")]
Usd = Annotated[float, between(0, 1e4, "USD an hour", "Give dollars of one machine and one hour")]
Share = Annotated[float, share()]
Counts = Annotated[list[Workers], Field(min_length=1)]
Times = Annotated[list[SecondsPer1000], Field(min_length=1)]
Batches = Annotated[
    list[Count],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    Field(min_length=1),
]
