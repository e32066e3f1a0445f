"""ADA against a formulation of its own: one sample at a time, from matrices, loops and NumPy.

The formulation follows the paper (Karras et al. 2020, appendix B) and its published defaults. It
shares the random draws with the implementation, and nothing else.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from torch.autograd import gradcheck, gradgradcheck

from gatdist.common.registry import call_with_options
from gatdist.game.augmentation import augmentations
from gatdist.game.augmentation.filters import NUM_BANDS, SYM2, SYM6, bands
from gatdist.parallel import draws

CPU = torch.device("cpu")
SEED, STREAM, START = 11, "s", 2**33
TRANSFORMATIONS = [
    *["flip", "quarter_turn", "integer_translation"],
    *["scale", "pre_rotation", "stretch", "post_rotation", "fractional_translation"],
    *["brightness", "contrast", "luma_flip", "hue", "saturation"],
    *["band_1", "band_2", "band_3", "band_4", "noise", "cutout"],
]
BANDS = TRANSFORMATIONS[13:17]
EVERYTHING = ["blit", "geometry", "color", "filter", "noise", "cutout"]


def ada(policy, p=1.0, **options):
    options = {"policy": policy, "p": p, **options}
    given = {"sample_shape": (3, 8, 8), "device": CPU}
    return call_with_options(augmentations["ada"], options, "game.augmentation", **given)


def images(n, *shape, dtype=torch.float64):
    return 2 * torch.rand(n, *shape, dtype=dtype, generator=torch.manual_seed(0)) - 1


def positions(n):
    return torch.arange(n) + START


def augmented(augment, samples):
    return augment(samples, SEED, STREAM, positions(len(samples)))


def drawn_for(n):
    """Return [n] dictionaries: name → (number compared with the probability, two numbers)."""
    rows = draws.uniform(SEED, STREAM, positions(n), (19, 3), torch.float64).numpy()
    return [dict(zip(TRANSFORMATIONS, row, strict=True)) for row in rows]


class Draws:
    """Numbers of one sample's transformations; those that are not applied give the neutral one."""

    def __init__(self, drawn, probabilities):
        self.drawn, self.probabilities = drawn, probabilities

    def applied(self, name):
        return self.drawn[name][0] < self.probabilities.get(name, 0.0)

    def uniform(self, name, i=0):
        return 2 * self.drawn[name][1 + i] - 1 if self.applied(name) else 0.0

    def normal(self, name, i=0):
        return float(ndtri(self.drawn[name][1 + i])) if self.applied(name) else 0.0


# The formulation


def geometric_matrix(draw, height, width):
    """Return the 3 × 3 matrix from places in the image to places in the result."""

    def scale(x, y):
        return np.array([[x, 0, 0], [0, y, 0], [0, 0, 1.0]])

    def rotate(angle):  # clockwise on the screen, as y points downwards, for negative angles
        c, s = math.cos(angle), math.sin(angle)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])

    def move(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    matrix = np.eye(3)
    if draw.uniform("flip") < 0:
        matrix = scale(-1, 1) @ matrix
    matrix = rotate(-math.pi / 2 * math.floor(2 * draw.uniform("quarter_turn"))) @ matrix
    x, y = (draw.uniform("integer_translation", i) * 0.125 for i in range(2))
    matrix = move(round(x * width), round(y * height)) @ matrix
    factor = 2 ** (0.2 * draw.normal("scale"))
    matrix = scale(factor, factor) @ matrix
    matrix = rotate(-math.pi * draw.uniform("pre_rotation")) @ matrix
    factor = 2 ** (0.2 * draw.normal("stretch"))
    matrix = scale(factor, 1 / factor) @ matrix
    matrix = rotate(-math.pi * draw.uniform("post_rotation")) @ matrix
    x, y = (draw.normal("fractional_translation", i) * 0.125 for i in range(2))
    return move(x * width, y * height) @ matrix


def upsampled(image, margin):
    """Reflect by ``margin`` pixels, put zeros between pixels, convolve with the wavelet filter."""
    framed = np.pad(image, margin, mode="reflect")
    stuffed = np.zeros([2 * side for side in framed.shape])
    stuffed[::2, ::2] = framed
    taps = SYM6 / SYM6.sum() * 2
    for axis in (0, 1):
        # The full convolution without its first 5 and last 6 entries.
        stuffed = np.apply_along_axis(lambda row: np.convolve(row, taps)[5:-6], axis, stuffed)
    return stuffed


def resampled(channel, matrix):
    """Sample the upsampled image at the mapped places, and halve its resolution."""
    height, width = channel.shape
    margin = 12 * max(height, width)
    fine = upsampled(channel, margin)
    source = np.float32(np.linalg.inv(matrix)).astype(np.float64)  # as the implementation rounds
    samples = np.zeros((2 * (height + 6), 2 * (width + 6)))
    for row in range(samples.shape[0]):
        for column in range(samples.shape[1]):
            # Pixels of the result lie on every other place; 3 pixels beyond each edge are sampled.
            x = (column - 6) / 2 - (width - 1) / 2
            y = (row - 6) / 2 - (height - 1) / 2
            x, y, _ = source @ [x, y, 1]
            x = 2 * (x + (width - 1) / 2 + margin)
            y = 2 * (y + (height - 1) / 2 + margin)
            left, top = math.floor(x), math.floor(y)
            assert 8 < left < fine.shape[1] - 8, "a larger margin is needed"
            assert 8 < top < fine.shape[0] - 8, "a larger margin is needed"
            right, below = x - left, y - top
            samples[row, column] = (
                (1 - below) * (1 - right) * fine[top, left]
                + (1 - below) * right * fine[top, left + 1]
                + below * (1 - right) * fine[top + 1, left]
                + below * right * fine[top + 1, left + 1]
            )
    taps = SYM6 / SYM6.sum()
    result = np.zeros(channel.shape)
    for row in range(height):
        for column in range(width):
            for i, vertical in enumerate(taps):
                for j, horizontal in enumerate(taps):
                    sample = samples[2 * row + i + 1, 2 * column + j + 1]
                    result[row, column] += vertical * horizontal * sample
    return result


def color_matrix(draw, channels):
    """Return the 4 × 4 matrix of (r, g, b, 1)."""
    luma = np.array([1, 1, 1, 0]) / math.sqrt(3)
    onto = np.outer(luma, luma)
    matrix = np.eye(4)
    brightness = np.eye(4)
    brightness[:3, 3] = 0.2 * draw.normal("brightness")
    matrix = brightness @ matrix
    matrix = np.diag([2 ** (0.5 * draw.normal("contrast"))] * 3 + [1.0]) @ matrix
    if draw.uniform("luma_flip") < 0:
        matrix = (np.eye(4) - 2 * onto) @ matrix
    if channels == 3:
        angle = math.pi * draw.uniform("hue")
        x, y, z = luma[:3]
        cross = np.zeros((4, 4))
        cross[:3, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]
        # Rodrigues' formula.
        rotation = np.eye(4) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
        matrix = rotation @ matrix
        factor = 2 ** draw.normal("saturation")
        saturation = onto + factor * (np.eye(4) - onto)
        saturation[3, 3] = 1
        matrix = saturation @ matrix
    return matrix


def recolored(image, matrix):
    channels, height, width = image.shape
    weights, offset = matrix[:3, :3], matrix[:3, 3]
    if channels == 1:  # the mean over three equal channels
        weights, offset = weights.sum(1, keepdims=True).mean(0, keepdims=True), offset[:1]
    weights, offset = (np.float32(each).astype(np.float64) for each in (weights, offset))
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            result[:, row, column] = weights @ image[:, row, column] + offset
    return result


def band_taps():
    """Return the bands' filters, [4, 43], from their frequency responses."""
    n = 64
    frequency = 2 * math.pi * np.arange(n) / n

    def low(frequency):  # |H|² / 2
        powers = np.exp(-1j * np.outer(np.arange(4), np.atleast_1d(frequency)))
        return np.abs(SYM2 @ powers) ** 2 / 2

    def high(frequency):
        return low(frequency + math.pi)

    once, twice = low(frequency), low(2 * frequency)
    responses = [
        once * twice * low(4 * frequency),
        once * twice * high(4 * frequency),
        once * high(2 * frequency),
        high(frequency),
    ]
    return [np.roll(np.fft.ifft(response).real, 21)[:43] for response in responses]


def filtered(image, draw):
    power = np.array([10, 1, 1, 1]) / 13
    gains = np.ones(4)
    for i, name in enumerate(BANDS):
        change = np.ones(4)
        change[i] = 2 ** draw.normal(name)
        gains *= change / math.sqrt((power * change**2).sum())
    gains = np.float32(gains).astype(np.float64)
    taps = sum(gain * band for gain, band in zip(gains, band_taps(), strict=True))
    for axis in (1, 2):
        image = np.apply_along_axis(
            lambda row: np.correlate(np.pad(row, 21, mode="reflect"), taps, "valid"), axis, image
        )
    return image


def cut(image, draw):
    if not draw.applied("cutout"):
        return image
    _, height, width = image.shape
    _, center_x, center_y = draw.drawn["cutout"]
    result = image.copy()
    for row in range(height):
        for column in range(width):
            over_x = abs((column + 0.5) / width - center_x)
            over_y = abs((row + 0.5) / height - center_y)
            if over_x < 0.25 and over_y < 0.25:
                result[:, row, column] = 0
    return result


def formulated(samples, probabilities):
    """Return the augmented samples, computed by the formulation; ``probabilities`` by name."""
    count = len(samples)
    noise = draws.normal(SEED, f"{STREAM}/noise", positions(count), samples.shape[1:]).numpy()
    found = []
    for image, drawn, grain in zip(samples.numpy(), drawn_for(count), noise, strict=True):
        draw = Draws(drawn, probabilities)
        matrix = geometric_matrix(draw, *image.shape[1:])
        result = np.stack([resampled(channel, matrix) for channel in image])
        result = recolored(result, color_matrix(draw, len(image)))
        result = filtered(result, draw)
        result = result + np.float32(0.1 * abs(draw.normal("noise"))).astype(np.float64) * grain
        found.append(cut(result, draw))
    return torch.from_numpy(np.stack(found))


def always(*names):
    return dict.fromkeys(names, 1.0)


# The comparison


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 8, 8), (3, 5, 9), (1, 7, 4)])
@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (["blit"], TRANSFORMATIONS[:3]),
        (["geometry"], TRANSFORMATIONS[3:8]),
        (["color"], TRANSFORMATIONS[8:13]),
        (["filter"], BANDS),
        (["noise"], ["noise"]),
        (["cutout"], ["cutout"]),
        (EVERYTHING, TRANSFORMATIONS),
    ],
    ids=lambda value: value[0] if len(value) == 1 else "",
)
def test_ada_equals_the_formulation(policy, names, shape):
    samples = images(4, *shape)
    found = augmented(ada(policy), samples)
    expected = formulated(samples, always(*names))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_each_transformation_equals_the_formulation(name):
    samples = images(3, 3, 6, 5)
    found = augmented(ada([name]), samples)
    torch.testing.assert_close(found, formulated(samples, always(name)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("p", [0.4, 0.9, 1.5])
def test_strengths_scale_the_probabilities(p):
    """Applied are the transformations whose first draw is below min(1, strength · p)."""
    policy = {"blit": 1.0, "geometry": 0.7, "color": 0.5, "hue": 1.0, "cutout": 0.25}
    strengths = always(*TRANSFORMATIONS[:3]) | dict.fromkeys(TRANSFORMATIONS[3:8], 0.7)
    strengths |= dict.fromkeys(TRANSFORMATIONS[8:13], 0.5) | {"hue": 1.0, "cutout": 0.25}
    probabilities = {name: min(1, np.float32(p) * s) for name, s in strengths.items()}
    for name in ("pre_rotation", "post_rotation"):
        probabilities[name] = 1 - math.sqrt(1 - probabilities[name])
    samples = images(10, 3, 5, 5)
    found = augmented(ada(policy, p), samples)
    torch.testing.assert_close(found, formulated(samples, probabilities), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("p", "strength"), [(0.3, 1.0), (0.8, 0.5), (1.6, 0.5), (2.5, 0.6)])
def test_each_transformation_happens_with_its_probability(p, strength):
    n, expected = 1500, min(1.0, p * strength)
    samples = images(1, 3, 8, 8, dtype=torch.float32).expand(n, -1, -1, -1)
    seen = dict.fromkeys(["pre_rotation", "post_rotation"], 1 - math.sqrt(1 - expected))
    seen |= {"flip": expected / 2, "luma_flip": expected / 2, "quarter_turn": expected * 3 / 4}
    seen["integer_translation"] = expected * 3 / 4  # U rounds to 0 with probability 1/2
    for name in TRANSFORMATIONS:
        found = augmented(ada({name: strength}, p), samples)
        share = ((found - samples).abs().flatten(1).amax(1) > 1e-4).double().mean().item()
        assert share == pytest.approx(seen.get(name, expected), abs=0.045), name


def test_at_least_one_rotation_happens_with_the_probability_of_a_transformation():
    samples = images(1, 1, 8, 8, dtype=torch.float32).expand(1500, -1, -1, -1)
    found = augmented(ada({"rotation": 0.5}, 0.8), samples)
    share = ((found - samples).abs().flatten(1).amax(1) > 1e-4).double().mean().item()
    assert share == pytest.approx(0.4, abs=0.04)


def test_a_single_name_takes_precedence_over_its_group():
    samples = images(8, 3, 6, 6)
    part = ada({"geometry": 1.0, "rotation": 0.0, "post_rotation": 1.0})
    names = ["scale", "stretch", "post_rotation", "fractional_translation"]
    assert torch.equal(augmented(part, samples), augmented(ada(names), samples))


def test_scheduled_p_is_used_and_does_not_adapt():
    schedule = {"start": 0.0, "end": 0.7, "samples": 100}
    augment, samples = ada(EVERYTHING, p=schedule), images(8, 3, 6, 6)
    assert torch.equal(augmented(augment, samples), samples)
    augment.follow(100)
    for step in range(8):
        augment.update({"augmentation/sign_real": torch.tensor(1.0)}, step, 1000)
    assert torch.equal(augmented(augment, samples), augmented(ada(EVERYTHING, p=0.7), samples))


# All groups together


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 9), (3, 33, 17), (4, 28, 28), (1, 1, 1)])
def test_augmentation_of_a_sample_does_not_depend_on_its_batch(shape, dtype):
    augment, samples = ada(EVERYTHING, 0.5), images(23, *shape).to(dtype)
    together = augmented(augment, samples)
    for size in (1, 2, 7):
        parts = zip(samples.split(size), positions(23).split(size), strict=True)
        found = torch.cat([augment(part, SEED, STREAM, at) for part, at in parts])
        assert torch.equal(together, found)
    order = torch.randperm(23, generator=torch.manual_seed(1))
    found = augment(samples[order], SEED, STREAM, positions(23)[order])
    assert torch.equal(together[order], found)


def test_a_sample_that_is_not_augmented_is_unchanged_bit_for_bit():
    samples = images(64, 3, 9, 9)
    samples[:, 0, 0, 0], samples[:, 0, 0, 1] = -0.0, math.nan
    found = augmented(ada(EVERYTHING, 0.02), samples)
    same = (found.view(torch.int64) == samples.view(torch.int64)).flatten(1).all(1)
    drawn = torch.tensor([[values[0] for values in row.values()] for row in drawn_for(64)])
    rotates = torch.tensor([name.endswith("_rotation") for name in TRANSFORMATIONS])
    limits = torch.where(rotates, 1 - math.sqrt(1 - 0.02), 0.02)
    assert torch.equal(same, ~(drawn < limits).any(1))
    assert 16 < same.sum() < 64


def test_all_groups_together_are_twice_differentiable():
    augment, samples = ada(EVERYTHING), images(2, 3, 3, 2).requires_grad_()
    assert gradcheck(lambda x: augmented(augment, x), samples)
    assert gradgradcheck(lambda x: augmented(augment, x).sin(), samples)


def test_no_host_synchronization():
    """The meta device has no values, so that reading one fails."""
    meta = torch.device("meta")
    augment = augmentations["ada"](
        sample_shape=(3, 8, 8), device=meta, policy=dict.fromkeys(EVERYTHING, 1.0)
    )
    samples = torch.empty(4, 3, 8, 8, device=meta)
    assert augment(samples, 0, "s", torch.arange(4, device=meta)).shape == samples.shape


# Filters


@pytest.mark.parametrize(("taps", "moments"), [(SYM2, 2), (SYM6, 6)])
def test_wavelets_are_orthonormal_with_vanishing_moments(taps, moments):
    """2 · ``moments`` equations, which determine the filter up to the choice of roots."""
    assert len(taps) == 2 * moments
    for shift in range(moments):
        product = (taps[2 * shift :] * taps[: len(taps) - 2 * shift]).sum()
        assert product == pytest.approx(float(shift == 0), abs=1e-11)
    places = np.arange(len(taps)) / len(taps)
    for moment in range(moments):
        assert ((-1.0) ** np.arange(len(taps)) * places**moment * taps).sum() == pytest.approx(
            0, abs=1e-11
        )


def test_sym6_is_the_least_asymmetric_choice_of_roots():
    """No filter with the same magnitude response deviates less from a linear phase."""
    zeros = np.roots(SYM6)
    zeros = zeros[np.abs(zeros + 1) > 0.05]  # others come in pairs z, 1/z̄ to choose from
    pairs, seen = [], set()
    for zero in zeros:
        key = frozenset({round(zero.real, 8) + 1j * round(abs(zero.imag), 8)})
        if key not in seen:
            seen.add(key)
            pairs.append([zero] if abs(zero.imag) < 1e-8 else [zero, zero.conjugate()])
    frequency = np.linspace(0.01, math.pi * 0.9, 200)

    def asymmetry(roots):
        phase = np.unwrap(
            np.angle(np.prod([1 - r * np.exp(-1j * frequency) for r in roots], axis=0))
        )
        slope = (phase @ frequency) / (frequency @ frequency)
        return np.abs(phase - slope * frequency).max()

    ones = [-1.0] * 6
    found = []
    for choice in range(2 ** len(pairs)):
        chosen = [
            1 / np.conj(root) if choice >> i & 1 else root
            for i, pair in enumerate(pairs)
            for root in pair
        ]
        found.append(asymmetry(ones + chosen))
    assert found[0] == pytest.approx(min(found), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 30, 64])
def test_the_bands_add_up_to_the_image(size):
    assert bands(size).shape == (NUM_BANDS, size, size)
    torch.testing.assert_close(bands(size).sum(0), torch.eye(size, dtype=torch.float64))
