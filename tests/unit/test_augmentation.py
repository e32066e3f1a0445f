"""Augmentation is a function of (seed, stream, position), exact where possible, and adaptive."""

import math
from contextlib import nullcontext
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

from gatdist.common.errors import ConfigError
from gatdist.common.numerics import kernels
from gatdist.common.registry import call_with_options
from gatdist.config import parse_config
from gatdist.game.augmentation import augmentations, build_augmentation, warp
from gatdist.nn import derivatives_of_gpus
from support import refused

CPU = torch.device("cpu")
GEOMETRIC = [
    "flip",
    "quarter_turn",
    "integer_translation",
    "scale",
    "pre_rotation",
    "stretch",
    "post_rotation",
    "fractional_translation",
]
COLOR = ["brightness", "contrast", "luma_flip", "hue", "saturation"]
SHAPES = [(3, 16, 16), (1, 5, 9), (3, 9, 4), (4, 8, 7), (2, 1, 6), (1, 1, 1)]
both = pytest.mark.parametrize("name", ["diffaugment", "ada"])


def augmentation(name, **options):
    """Return the augmentation; ADA's default here is p = 1."""
    if name == "ada" and "p" not in options:
        options = {"initial_p": 1.0, **options}
    given = {"sample_shape": (3, 8, 8), "device": CPU}
    return call_with_options(augmentations[name], options, "game.augmentation", **given)


def ada(*policy, p=1.0):
    return augmentation("ada", initial_p=p, policy=list(policy))


def images(n, *shape, dtype=torch.float32, seed=0):
    return 2 * torch.rand(n, *shape, dtype=dtype, generator=torch.manual_seed(seed)) - 1


def augmented(augment, samples, stream="s", seed=7):
    return augment(samples, seed, stream, torch.arange(len(samples)) + 2**33)


# Keyed by sample


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_augmentation_of_a_sample_does_not_depend_on_its_batch(name, shape, dtype):
    augment = augmentation(name, initial_p=0.5) if name == "ada" else augmentation(name)
    samples, positions = images(23, *shape).to(dtype), 5 * torch.arange(23) + 2**33
    together = augment(samples, 3, "s", positions)
    assert together.shape == samples.shape
    assert together.dtype == dtype
    assert together.isfinite().all()
    for size in (1, 2, 7):
        pieces = zip(samples.split(size), positions.split(size), strict=True)
        assert torch.equal(together, torch.cat([augment(s, 3, "s", p) for s, p in pieces]))
    order = torch.randperm(23, generator=torch.manual_seed(1))
    assert torch.equal(together[order], augment(samples[order], 3, "s", positions[order]))


@both
def test_draws_depend_on_seed_stream_and_position(name):
    augment, samples, positions = augmentation(name), images(16, 3, 8, 8), torch.arange(16)
    base = augment(samples, 1, "real", positions)
    for other in (
        augment(samples, 2, "real", positions),
        augment(samples, 1, "fake", positions),
        augment(samples, 1, "real", positions + 16),
    ):
        assert (base != other).flatten(1).any(1).all()


@both
def test_order_of_the_policy_has_no_effect(name):
    policy = {"ada": ["blit", "geometry", "color"], "diffaugment": ["color", "cutout"]}[name]
    samples = images(16, 3, 8, 8)
    assert torch.equal(
        augmented(augmentation(name, policy=policy), samples),
        augmented(augmentation(name, policy=policy[::-1]), samples),
    )


@both
def test_memory_layout_has_no_effect(name):
    augment, samples = augmentation(name), images(8, 3, 6, 8)
    last = samples.to(memory_format=torch.channels_last)
    torch.testing.assert_close(augmented(augment, last), augmented(augment, samples))


@both
def test_no_host_synchronization(name):
    """The meta device has no values, so reading one fails."""
    meta = torch.device("meta")
    augment = augmentations[name](sample_shape=(3, 8, 8), device=meta)
    samples = torch.empty(4, 3, 8, 8, device=meta)
    found = augment(samples, 0, "s", torch.arange(4, device=meta))
    assert found.shape == samples.shape
    for step in range(8):
        seen = augment.observe(found.mean((1, 2, 3)))
        augment.update({tag: seen[tag].mean() for tag in augment.tags}, step, 4)


# Derivatives


@both
def test_twice_differentiable_in_the_samples(name):
    augment = augmentation(name)
    samples = images(4, 3, 2, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: augmented(augment, x), samples)
    assert gradgradcheck(lambda x: augmented(augment, x).sin(), samples)


@both
def test_gradient_penalty_on_augmented_samples(name):
    """Compare its gradient by the discriminator's weights with finite differences."""
    augment = augmentation(name)
    samples = images(6, 1, 5, 4, dtype=torch.float64)
    weights = images(1, 5, 4, dtype=torch.float64, seed=1).requires_grad_()

    def penalty(weights):
        inputs = samples.clone().requires_grad_()
        logits = (augmented(augment, inputs) * weights).sum((1, 2, 3)).tanh()
        (slopes,) = grad(logits.sum(), inputs, create_graph=True)
        return slopes.square().sum()

    assert gradcheck(penalty, weights)


# DiffAugment


def test_diffaugment_color_equals_the_paper():
    """Its three numbers, recovered from images, are in range and reproduce the result."""
    x = images(500, 3, 4, 5, dtype=torch.float64)
    grey, mean = x.mean(1, keepdim=True).expand_as(x), x.mean((1, 2, 3), keepdim=True)
    found = augmented(augmentation("diffaugment", policy=["color"]), x)
    terms = torch.stack([x, grey, torch.ones_like(x)], -1).flatten(1, 3)
    solution = torch.linalg.lstsq(terms, found.flatten(1)[..., None]).solution
    at_x, at_grey, base = solution.view(500, 3, 1, 1, 1).unbind(1)
    contrast = at_x + at_grey
    saturation, brightness = at_x / contrast, base - (1 - contrast) * mean
    for value, low, high in ((brightness, -0.5, 0.5), (saturation, 0, 2), (contrast, 0.5, 1.5)):
        assert low <= value.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < value.max() <= high
    step = x + brightness
    over = step.mean(1, keepdim=True)
    step = (step - over) * saturation + over
    whole = step.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close((step - whole) * contrast + whole, found)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 9), (2, 12, 3)])
def test_diffaugment_translates_by_whole_pixels_and_fills_with_zeros(shape):
    height, width = shape[1:]
    most_y, most_x = round(height / 8), round(width / 8)
    samples = images(200, *shape)
    framed = torch.nn.functional.pad(samples, [most_x, most_x, most_y, most_y])
    shifted = {
        (y, x): framed[:, :, y : y + height, x : x + width]
        for y in range(2 * most_y + 1)
        for x in range(2 * most_x + 1)
    }
    found = augmented(augmentation("diffaugment", policy=["translation"]), samples)
    matches = torch.stack([(found == s).flatten(1).all(1) for s in shifted.values()])
    assert (matches.sum(0) == 1).all()
    assert matches.any(1).all(), "some shift never comes"


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 9), (12, 3)])
def test_diffaugment_cuts_out_a_box(height, width):
    found = augmented(
        augmentation("diffaugment", policy=["cutout"]), torch.ones(400, 2, height, width)
    )
    cut = found[:, 0] == 0
    assert torch.equal(found, (~cut[:, None]).float().expand(-1, 2, -1, -1))
    rows, columns = cut.any(2), cut.any(1)
    assert torch.equal(cut, rows[:, :, None] & columns[:, None])
    for side, size in ((rows, height), (columns, width)):
        edges = side.int().diff(dim=1).abs().sum(1)
        assert (edges <= 2).all(), "more than one box"
        assert side.sum(1).max() == math.floor(size / 2 + 0.5)
        assert side.any(0).all(), "some place is never cut"


# ADA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_p_of_zero_changes_no_bit(shape, dtype):
    samples = images(9, *shape).to(dtype)
    samples[0, 0, 0, 0], samples[1, 0, 0, 0], samples[2, 0, 0, 0] = -0.0, math.inf, math.nan
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    found = augmented(augmentation("ada", initial_p=0.0), samples)
    assert torch.equal(found.view(bits), samples.view(bits))


# ADA: strengths, probabilities and order of the transformations


def color_maps(*policy, n=1500):
    """Return color maps recovered from four colors: matrices [n, 3, 3] and offsets [n, 3]."""
    basis = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    augment = ada(*policy)
    offset, *columns = (
        augmented(augment, color.view(1, 3, 1, 1).repeat(n, 1, 1, 1))[:, :, 0, 0] for color in basis
    )
    return torch.stack(columns, 2) - offset[:, :, None], offset


def homogeneous(matrix, offset):
    found = torch.eye(4, dtype=matrix.dtype).repeat(len(matrix), 1, 1)
    found[:, :3, :3], found[:, :3, 3] = matrix, offset
    return found


def test_color_transformations_follow_the_papers_order():
    whole = homogeneous(*color_maps("color"))
    single = [homogeneous(*color_maps(name)) for name in reversed(COLOR)]
    torch.testing.assert_close(reduce(torch.matmul, single), whole, atol=1e-5, rtol=1e-5)


def test_color_strengths():
    identity, grey = torch.eye(3).double(), torch.full((3, 3), 1 / 3).double()

    matrix, offset = color_maps("brightness")
    torch.testing.assert_close(matrix, identity.expand_as(matrix))
    torch.testing.assert_close(offset, offset[:, :1].expand(-1, 3))
    assert offset.std().item() == pytest.approx(0.2, rel=0.1)

    matrix, offset = color_maps("contrast")
    factor = matrix[:, 0, 0]
    torch.testing.assert_close(matrix, factor[:, None, None] * identity)
    assert factor.log2().std().item() == pytest.approx(0.5, rel=0.1)

    matrix, offset = color_maps("luma_flip")
    flipped = matrix[:, 0, 0] < 0.9
    assert flipped.double().mean().item() == pytest.approx(0.5, abs=0.06)
    expected = torch.where(flipped[:, None, None], identity - 2 * grey, identity)
    torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=0)

    matrix, offset = color_maps("hue")
    torch.testing.assert_close(matrix @ matrix.mT, identity.expand_as(matrix), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix @ grey, grey.expand_as(matrix), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.det(), torch.ones(len(matrix)).double())
    assert matrix[:, 0, 0].min() < -0.32, "half a turn takes 1 to −1/3"

    matrix, offset = color_maps("saturation")
    factor = (matrix[:, 0, 0] - 1 / 3) * 3 / 2
    torch.testing.assert_close(
        matrix, grey + factor[:, None, None] * (identity - grey), atol=1e-6, rtol=1e-6
    )
    assert factor.log2().std().item() == pytest.approx(1, rel=0.1)
    assert factor.log2().mean().item() == pytest.approx(0, abs=0.13)


def test_grayscale_luma_equals_that_of_three_equal_channels():
    samples = images(50, 1, 4, 4)
    alone = augmented(ada("color"), samples)
    three = augmented(ada("color"), samples.expand(-1, 3, -1, -1))
    torch.testing.assert_close(three, alone.expand_as(three), atol=1e-5, rtol=1e-5)
    other = augmented(ada("color"), samples.expand(-1, 4, -1, -1))
    no_flip = augmented(ada("brightness", "contrast"), samples)
    torch.testing.assert_close(other, no_flip.expand_as(other))


def geometric_maps(*policy, n=1500, size=64):
    """Return maps [n, 3, 3] recovered from two neighbors of the middle, in pixels from it."""
    ramp = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    places = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)])
    found = augmented(ada(*policy), places.expand(n, -1, -1, -1))
    middle = size // 2
    origin, right, below = (
        found[:, :, middle + y, middle + x] for y, x in ((0, 0), (0, 1), (1, 0))
    )
    maps = torch.eye(3, dtype=torch.float64).repeat(n, 1, 1)
    maps[:, :2, 0], maps[:, :2, 1] = right - origin, below - origin
    maps[:, :2, 2] = origin - (maps[:, :2, 0] + maps[:, :2, 1]) / 2
    return maps


def test_geometric_transformations_follow_the_papers_order():
    """The image's map is the product of the single maps; this one is its inverse."""
    whole = geometric_maps("blit", "geometry", n=200)
    expected = reduce(torch.matmul, [geometric_maps(name, n=200) for name in GEOMETRIC])
    inside = expected[:, :2, 2].abs().amax(1) < 25  # beyond it, the mirrored image is visible
    assert inside.sum() > 100
    torch.testing.assert_close(whole[inside], expected[inside], atol=1e-3, rtol=1e-3)


def test_geometric_strengths():
    n, size = 1500, 24

    def maps(name):
        return geometric_maps(name, n=n, size=size)

    scale, stretch = maps("scale"), maps("stretch")
    torch.testing.assert_close(scale[:, 0, 0], scale[:, 1, 1])
    torch.testing.assert_close(stretch[:, 0, 0] * stretch[:, 1, 1], torch.ones(n).double())
    for found in (scale, stretch):
        assert found[:, 0, 0].log2().std().item() == pytest.approx(0.2, rel=0.1)
        assert found[:, 0, 1].abs().max() < 1e-5
    for name in ("pre_rotation", "post_rotation"):
        turned = maps(name)[:, :2, :2]
        torch.testing.assert_close(turned @ turned.mT, torch.eye(2).double().expand_as(turned))
        angle = torch.atan2(turned[:, 1, 0], turned[:, 0, 0])
        assert angle.abs().max() > 3.1
        assert angle.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.1)
    moved = maps("fractional_translation")[:, :2, 2]
    moved = moved[moved.abs().amax(1) < 2 * size / 8]
    assert moved.std().item() == pytest.approx(0.88 * size / 8, rel=0.1)  # cut at two deviations
    assert (moved - moved.round()).abs().max() > 0.4


# ADA: updates of p


def updated(means, start=0, num_samples=10, **options):
    """Return ADA updated by means of the sign of real logits, one per step."""
    start_p = {} if "p" in options else {"initial_p": 0.5}
    adaptive_state = augmentation("ada", **{**start_p, "adjust_samples": 1000, **options})
    feed(adaptive_state, means, start, num_samples)
    return adaptive_state


def feed(adaptive_state, means, start=0, num_samples=10):
    for step, mean in enumerate(means, start):
        seen = {} if mean is None else {"augmentation/sign_real": torch.tensor(mean)}
        adaptive_state.update(seen, step, num_samples)


def p_of(adaptive_state):
    return adaptive_state.tensors["p"].item()


def test_p_rises_with_overfitting_and_falls_without():
    assert p_of(updated([0.7] * 4)) == pytest.approx(0.54)
    assert p_of(updated([0.5] * 4)) == pytest.approx(0.46)
    assert p_of(updated([0.5] * 4, target=0.4)) == pytest.approx(0.54)
    assert p_of(updated([1.0, 1.0, 0.1, 0.1])) == pytest.approx(0.46), "their mean decides"
    assert p_of(updated([0.7] * 3)) == 0.5, "not before the interval's end"
    assert p_of(updated([0.7] * 2, interval_steps=1)) == pytest.approx(0.52)


def test_p_goes_from_0_to_1_in_adjust_samples():
    assert p_of(updated([0.9] * 96, initial_p=0.0)) == pytest.approx(0.96)
    assert p_of(updated([0.9] * 100, initial_p=0.0)) == pytest.approx(1.0)


@given(st.lists(st.floats(-1, 1), max_size=60), st.floats(0, 1), st.integers(1, 500))
def test_p_is_never_negative(means, initial_p, num_samples):
    adaptive_state = updated(means, num_samples=num_samples, initial_p=initial_p, interval_steps=2)
    assert p_of(adaptive_state) >= 0


def test_p_rises_above_1_and_falls_again():
    assert p_of(updated([0.9] * 200, initial_p=0.5)) == pytest.approx(2.5)
    assert p_of(updated([0.9] * 200 + [0.1] * 100, initial_p=0.5)) == pytest.approx(1.5)


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf, None])
def test_missing_or_nonfinite_mean_is_skipped(nothing):
    assert p_of(updated([0.7, nothing, 0.7, nothing])) == pytest.approx(0.54)
    assert p_of(updated([0.5, 0.5, 0.5, nothing])) == pytest.approx(0.46)
    adaptive_state = updated([nothing] * 4)
    assert p_of(adaptive_state) == 0.5
    feed(adaptive_state, [0.7] * 4, start=4)
    assert p_of(adaptive_state) == pytest.approx(0.54)


def test_fixed_p_does_not_change():
    assert p_of(updated([0.9] * 8, p=0.5)) == 0.5


@pytest.mark.parametrize("cut", range(9))
def test_resumed_run_is_exact_wherever_it_was_interrupted(cut):
    means = [0.9, 0.1, 0.8, 0.7, -0.3, 0.9, 0.9, 0.9, 0.61]
    whole, first = updated(means), updated(means[:cut])
    resumed = augmentation("ada", adjust_samples=1000)
    held = dict(resumed.tensors)
    for name, tensor in first.tensors.items():
        resumed.tensors[name].copy_(tensor)
    feed(resumed, means[cut:], start=cut)
    for name, tensor in whole.tensors.items():
        assert torch.equal(held[name], tensor), "changed in place, and equal"
    samples = images(8, 3, 8, 8)
    assert torch.equal(augmented(resumed, samples), augmented(whole, samples))


def test_signs_and_p_are_reported():
    adaptive_state = augmentation("ada", initial_p=0.25)
    seen = adaptive_state.observe(torch.tensor([-3.0, 0.0, 0.2]))
    feed(adaptive_state, [0.9] * 4)
    assert set(adaptive_state.tags) <= set(seen)
    assert seen["augmentation/sign_real"].tolist() == [-1, 0, 1]
    assert seen["augmentation/p"].tolist() == [0.25] * 3, "p as it was"


# Options


def config_with(**options):
    return parse_config(
        {
            "run": {"total_samples": 64},
            "data": {"url": "builtin:digits"},
            "game": {"augmentation": options},
        }
    )


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ({"name": "adaa"}, "name", "adaa"),
        ({"name": "ada", "targte": 0.5}, "targte", None),
        ({"name": "ada", "target": "high"}, "target", "high"),
        ({"name": "ada", "target": 1.0}, "target", 1.0),
        ({"name": "ada", "target": math.nan}, "target", math.nan),
        ({"name": "ada", "initial_p": math.inf}, "initial_p", math.inf),
        ({"name": "ada", "p": -0.1}, "p", -0.1),
        ({"name": "ada", "p": True}, "p", True),
        ({"name": "ada", "p": 0.5, "initial_p": 0.5}, "initial_p", 0.5),
        ({"name": "ada", "initial_p": -0.1}, "initial_p", -0.1),
        ({"name": "ada", "adjust_samples": 0}, "adjust_samples", 0),
        ({"name": "ada", "interval_steps": 0}, "interval_steps", 0),
        ({"name": "ada", "policy": ["colour"]}, "policy", "colour"),
        ({"name": "ada", "policy": []}, "policy", []),
        ({"name": "ada", "policy": {}}, "policy", []),
        ({"name": "ada", "policy": "color"}, "policy", "color"),
        ({"name": "ada", "policy": [["color"]]}, "policy", [["color"]]),
        ({"name": "ada", "policy": ["color", {}]}, "policy", ["color", {}]),
        ({"name": "ada", "policy": {"color": -0.5}}, "policy.color", -0.5),
        ({"name": "ada", "policy": {"color": math.nan}}, "policy.color", math.nan),
        ({"name": "ada", "policy": {"color": math.inf}}, "policy.color", math.inf),
        ({"name": "ada", "policy": {"color": "high"}}, "policy.color", "high"),
        ({"name": "ada", "policy": {"colour": 0.5}}, "policy", "colour"),
        ({"name": "diffaugment", "policy": ["cutuot"]}, "policy", "cutuot"),
        ({"name": "diffaugment", "policy": []}, "policy", []),
        ({"name": "diffaugment", "policy": "color"}, "policy", "color"),
        ({"name": "diffaugment", "target": 0.6}, "target", None),
    ],
)
def test_invalid_options_are_rejected(options, key, value):
    with refused(ConfigError, f"game.augmentation.{key}") as caught:
        build_augmentation(config_with(**options), (3, 8, 8), CPU)
    assert repr(caught.value.value) == repr(value)


@both
def test_augmentation_is_built_from_configuration(name):
    built = build_augmentation(config_with(name=name, policy=["color"]), (3, 8, 8), CPU)
    assert isinstance(built, augmentations[name])
    with refused(ConfigError, "game.augmentation"):
        build_augmentation(config_with(name=name), (2,), CPU)


# Interpolation as on GPUs


def test_images_are_interpolated_on_gpus_as_on_cpus():
    generator = torch.manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    for shape in ((4, 3, 16, 16), (2, 3, 9, 4), (2, 1, 1, 6), (3, 2, 8, 33)):
        x = numbers(*shape).requires_grad_()
        sources = torch.eye(3, dtype=torch.float64) + 0.3 * numbers(shape[0], 3, 3)
        sources[:, :2, 2] *= 10
        direction = numbers(*shape).requires_grad_()
        results = []
        for as_on_gpus in (nullcontext, derivatives_of_gpus):
            with as_on_gpus():
                y = warp.resample(x, sources)
                (slope,) = grad(y, x, direction, create_graph=True)
                results.append([y, slope, *grad(slope.pow(3).sum(), direction)])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11 * theirs.abs().max().item())


@pytest.mark.parametrize("deterministic", [False, True])
def test_images_are_interpolated_by_gathers_if_kernels_must_be_deterministic(deterministic):
    with derivatives_of_gpus(), kernels(deterministic=deterministic):
        y = warp.resample(images(2, 3, 8, 8).requires_grad_(), torch.eye(3).expand(2, 3, 3))
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes += [before for before, _ in node.next_functions]
    assert any("Gather" in name for name in names) == deterministic
    assert any("Interpolated" in name for name in names) != deterministic
