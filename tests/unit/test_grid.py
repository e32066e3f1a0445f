"""Image grids: every sample once, at its position."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gatdist.monitor.grid import encode_png, make_grid, make_rows, make_scatter

GAP = 4


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("n", "columns"), [(1, None), (1, 5), (7, 3), (12, 4), (10, None), (3, 9)])
@pytest.mark.parametrize(
    ("height", "width", "scale"), [(8, 8, 6), (5, 9, 10), (64, 48, 1), (1, 1, 48)]
)
def test_every_pixel_is_at_its_position(n, columns, height, width, channels, scale):
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 255, (n, height, width, channels), dtype=np.uint8)
    grid = make_grid(samples, columns)
    across = min(columns or int(np.ceil(np.sqrt(n))), n)
    down = -(-n // across)
    cell = height * scale + GAP, width * scale + GAP
    assert grid.shape == (GAP + down * cell[0], GAP + across * cell[1], channels)
    rest = grid.astype(np.int64)
    for i, sample in enumerate(samples):
        top, left = GAP + i // across * cell[0], GAP + i % across * cell[1]
        place = np.s_[top : top + height * scale, left : left + width * scale]
        assert (grid[place] == np.kron(sample, np.ones((scale, scale, 1), np.uint8))).all()
        rest[place] = 255
    assert (rest == 255).all()  # white everywhere else


def test_rows_show_images_of_several_sizes_at_one_height():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (5, 12, 6, 1), dtype=np.uint8)
    large = rng.integers(0, 255, (5, 24, 24, 3), dtype=np.uint8)
    grid = make_rows({"small": small, "large": large})
    height, widths, title = 48, (24, 48), 14
    group = sum(widths) + 2 * 2 + 12 + GAP
    per_line = (grid.shape[1] - GAP) // group
    assert grid.shape == (
        title + GAP + -(-5 // per_line) * (height + GAP),
        GAP + per_line * group,
        3,
    )
    for i in range(5):
        top = title + GAP + i // per_line * (height + GAP)
        left = GAP + i % per_line * group
        shown = grid[top : top + height, left : left + widths[0]]
        assert (shown == np.kron(small[i], np.ones((4, 4, 3), np.uint8))).all()
        left += widths[0] + 2
        shown = grid[top : top + height, left : left + widths[1]]
        assert (shown == np.kron(large[i], np.ones((2, 2, 1), np.uint8))).all()
    assert (grid[:title] < 255).any()


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (5, 3), (6, 3)])
def test_channels_that_no_image_has_are_skipped(channels, shown):
    samples = np.arange(2 * 50 * 50 * channels, dtype=np.uint8).reshape(2, 50, 50, channels)
    assert (make_grid(samples) == make_grid(np.ascontiguousarray(samples[..., :shown]))).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_has_the_same_pixels(channels):
    image = np.random.default_rng(1).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(image))) as opened:
        assert opened.format == "PNG"
        assert (np.asarray(opened).reshape(image.shape) == image).all()


def test_scatter_draws_points_at_their_positions():
    points = np.array([[-0.9, 0.9], [0.9, -0.9]])
    image = make_scatter(points, extent=1.0, size=100)[..., 0]
    rows, columns = np.nonzero(image == 0)
    assert len(rows) == 8  # two dots of 2 × 2 pixels
    # The first is at the upper left, the second at the lower right.
    assert sorted({(r < 50, c < 50) for r, c in zip(rows, columns, strict=True)}) == [
        (False, False),
        (True, True),
    ]
    assert min(rows) == pytest.approx(5, abs=1.5)
    assert max(columns) == pytest.approx(95, abs=1.5)


def test_scatter_skips_points_outside_or_not_finite():
    points = np.array([[2.0, 0.0], [0.0, -2.0], [np.nan, 0.0], [np.inf, 0.0], [1.0, 1.0]])
    assert (make_scatter(points, extent=1.0, size=50) == 255).all()
    corner = np.nextafter(1.0, 0.0) * np.array([[1, 1], [-1, -1], [1, -1], [-1, 1.0]])
    assert (make_scatter(corner, extent=1.0, size=50) == 0).sum() == 16
