"""Resampling against matrices, in value, first and second derivative."""

from contextlib import nullcontext

import pytest
import torch

from gatdist.models.image.resampling import blur, downsample, upsample
from gatdist.nn import derivatives_of_gpus
from published_resampling import blurred, downsampled, upsampled

OPERATORS = {
    "upsample": (upsample, upsampled),
    "downsample": (downsample, downsampled),
    "blur 0": (lambda x: blur(x, 0), lambda x: blurred(x, 0)),
    "blur 1": (lambda x: blur(x, 1), lambda x: blurred(x, 1)),
    "blur 2": (lambda x: blur(x, 2), lambda x: blurred(x, 2)),
    "blur 3": (lambda x: blur(x, 3), lambda x: blurred(x, 3)),
    "upsample × 2": (lambda x: upsample(x, 2), lambda x: 2 * upsampled(x)),
    "downsample × 4": (lambda x: downsample(x, 4), lambda x: 4 * downsampled(x)),
}
over_operators = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(autouse=True, params=["as on CPUs", "as on GPUs"])
def path(request):
    with derivatives_of_gpus() if request.param == "as on GPUs" else nullcontext():
        yield


def in_both_formats(x):
    return x, x.to(memory_format=torch.channels_last)


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@over_operators
@pytest.mark.parametrize("size", [(4, 4), (8, 6), (4, 16)])
def test_values_and_derivatives_are_those_of_zero_stuffing_and_convolution(name, size):
    found_of, expected_of = OPERATORS[name]
    for laid_out in in_both_formats(images(2, 3, *size)):
        compare(found_of, expected_of, laid_out.requires_grad_())


def compare(found_of, expected_of, x):
    found, expected = found_of(x), expected_of(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = images(*found.shape).requires_grad_()
    gradients = [
        torch.autograd.grad(y, x, direction, create_graph=True)[0] for y in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    seconds = [torch.autograd.grad(g.pow(3).sum(), direction)[0] for g in gradients]
    torch.testing.assert_close(*seconds, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["upsample", "downsample"])
def test_sides_of_two_pixels_are_resampled_too(name):
    found_of, expected_of = OPERATORS[name]
    x = images(1, 2, 2, 2)
    torch.testing.assert_close(found_of(x), expected_of(x), rtol=0, atol=1e-12)


@over_operators
def test_a_sample_has_the_same_bits_alone_and_at_any_place_of_a_batch(name):
    operator = OPERATORS[name][0]
    x = images(5, 3, 8, 8, dtype=torch.float32)
    together = operator(x)
    for i in range(5):
        assert torch.equal(operator(x[i : i + 1])[0], together[i])


@over_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_without_overflow(name, dtype):
    found_of, expected_of = OPERATORS[name]
    x = images(2, 3, 8, 8).to(dtype)
    x[0] = 0.2 * torch.finfo(dtype).max if dtype == torch.float16 else x[0]
    found = found_of(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected_of(x.double()), rtol=0.03, atol=0.03)


@over_operators
def test_the_memory_format_is_kept(name):
    x = images(2, 3, 8, 8).to(memory_format=torch.channels_last)
    found = OPERATORS[name][0](x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, OPERATORS[name][0](x.contiguous()), rtol=0, atol=1e-12)
