"""How often a picture can be halved, which is what most architectures ask of its size."""

from __future__ import annotations

import math

from gatdist.common.errors import ConfigError
from gatdist.models.registry import require_rank

Size = tuple[int, int]

# Of the coarsest feature maps, the shorter side.
COARSEST = 4


def halvings(size: Size, smallest: int = COARSEST) -> int:
    """How often both sides can be halved exactly, the shorter one down to ``smallest`` or more."""
    count = 0
    while all(side % 2 == 0 for side in size) and min(size) // 2 >= smallest:
        size = size[0] // 2, size[1] // 2
        count += 1
    return count


def require_halvings(sample_shape: tuple[int, ...], name: str, *, least: int, most: int = 8) -> int:
    """How often pictures are halved, to a shorter side of 4 or more.

    Args:
        sample_shape: (C, H, W).
        name: of the networks, for messages.
        least: halvings that the networks need.
        most: that they know.

    Raises:
        ConfigError: no pictures, or of another size; the nearest that fits is told.
    """
    require_rank(sample_shape, 3, name)
    size = sample_shape[1], sample_shape[2]
    count = halvings(size)
    if least <= count <= most:
        return count
    raise ConfigError(
        "data.resolution",
        f"{name!r} does pictures whose sides can be halved {least} to {most} times, to no less "
        f"than {COARSEST}",
        value=list(size),
        hint=f"Set it to {list(_nearest(size, least, most))}, or use the networks 'residual', "
        "which do any size",
    )


def _nearest(size: Size, least: int, most: int) -> Size:
    """The nearest size, side by side, that can be halved often enough."""
    found = [(COARSEST * 2**most, COARSEST * 2**most)]
    for times in range(least, most + 1):
        height, width = (max(COARSEST, round(side / 2**times)) * 2**times for side in size)
        if least <= halvings((height, width)) <= most:
            found.append((height, width))
    return min(
        found, key=lambda sides: sum(abs(math.log(a / b)) for a, b in zip(sides, size, strict=True))
    )
