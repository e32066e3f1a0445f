"""Operators that replace torch's nondeterministic ones on CUDA: values and both derivatives."""

import pytest
import torch
from torch.nn import functional

from gatdist.models.audio import LogMel, shift
from gatdist.models.image.biggan import max_pool
from gatdist.models.image.residual import interpolate
from gatdist.models.layers import one_hot
from gatdist.nn import derivatives_of_gpus


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def require_same(found_of, expected_of, x, atol=1e-12):
    """Compare values, gradients, and derivatives of the gradients by input and direction."""
    x = x.requires_grad_()
    outputs = found_of(x), expected_of(x)
    torch.testing.assert_close(*outputs, rtol=0, atol=atol)
    direction = numbers(*outputs[0].shape, seed=2).requires_grad_()
    gradients = [torch.autograd.grad(y, x, direction, create_graph=True)[0] for y in outputs]
    torch.testing.assert_close(*gradients, rtol=0, atol=atol)
    for inputs in (x, direction):
        seconds = [
            torch.autograd.grad(
                g.pow(3).sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            for g in gradients
        ]
        torch.testing.assert_close(*seconds, rtol=0, atol=10 * atol)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 4), (8, 8)),
        ((2, 3), (4, 6)),
        ((4, 4), (7, 7)),
        ((7, 7), (4, 4)),
        ((64, 33), (32, 17)),
        ((4, 9), (8, 17)),
        ((1, 5), (2, 10)),
    ],
)
def test_interpolation_is_that_of_torch(before, after):
    def expected(x):
        return functional.interpolate(x, after, mode="bilinear", align_corners=False)

    require_same(lambda x: interpolate(x, after), expected, numbers(2, 3, *before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_interpolation_keeps_the_dtype(dtype):
    x = numbers(2, 3, 5, 4).to(dtype)
    found = interpolate(x, (9, 8))
    assert found.dtype == dtype
    expected = functional.interpolate(x.double(), (9, 8), mode="bilinear")
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * 3)


def test_maximum_is_that_of_torch():
    require_same(max_pool, lambda x: functional.max_pool2d(x, 2), numbers(2, 3, 6, 8))


def test_first_of_equal_pixels_has_the_gradient_of_the_maximum():
    few = numbers(8, 16, 16, 16).mul(2).round()  # equal maxima in most windows
    require_same(max_pool, lambda x: functional.max_pool2d(x, 2), few, atol=0)


@pytest.mark.parametrize("place", range(4))
def test_maximum_of_nan_is_nan(place):
    x = torch.zeros(1, 1, 2, 2)
    x.view(-1)[place] = torch.nan
    assert max_pool(x).isnan().all()


@pytest.mark.parametrize(("length", "most"), [(16, 2), (16, 15), (5, 4), (3, 2)])
def test_shift_has_the_derivatives_of_a_gather(length, most):
    places = torch.arange(-most, most + 1)
    padded = functional.pad(torch.arange(float(length))[None], (most, most), mode="reflect")[0]
    sources = torch.stack([padded[most - s : most - s + length] for s in places.tolist()]).long()

    def expected(x):
        return x.gather(2, sources[:, None].expand_as(x))

    x = numbers(2 * most + 1, 3, length)
    require_same(lambda x: shift(x, places, most), expected, x, atol=0)
    with derivatives_of_gpus():
        require_same(lambda x: shift(x, places, most), expected, x, atol=0)


@pytest.mark.parametrize("length", [4096, 300, 257, 256, 64])
def test_spectrograms_are_those_of_torch(length):
    front = LogMel(8000, 64, 512, 128).double()

    def expected(clips):
        spectrum = torch.stft(
            clips.flatten(0, 1),
            512,
            128,
            window=front.hann,
            pad_mode="reflect" if length > 256 else "constant",
            return_complex=True,
        )
        power = torch.view_as_real(spectrum).square().sum(-1) * (2 / front.hann.sum()) ** 2
        levels = (front.bands @ power + 1e-4).log() * (-2 / torch.tensor(1e-4).double().log()) + 1
        return levels.unflatten(0, clips.shape[:2])

    require_same(front, expected, numbers(2, 2, length), atol=1e-7)


def test_one_hot_is_the_argmax_with_the_gradient_of_softmax():
    scores = numbers(3, 5, 4).requires_grad_()
    found = one_hot(scores, 0.5)
    expected = functional.one_hot(scores.argmax(1), 5).movedim(-1, 1)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-12)
    weights = numbers(3, 5, 4, seed=2)
    gradients = [
        torch.autograd.grad((y * weights).sum(), scores)[0]
        for y in (found, (scores / 0.5).softmax(1))
    ]
    torch.testing.assert_close(*gradients)
