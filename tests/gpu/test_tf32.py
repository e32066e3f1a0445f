"""The tolerances of the GPU tests, on CPUs with TF32 emulated."""

import pytest
import torch
from steps import TOLERANCES, error
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution.default: (0, 1), aten.convolution_backward.default: (0, 1, 2)}
PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


def rounded(x):
    """Round float32 to 10 bits of mantissa, ties away from zero, as tensor cores' inputs are."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32).view_as(x)


class TensorCores(TorchDispatchMode):
    """Rounds the inputs of convolutions and products where torch's switches would on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = ()
        if torch.backends.cudnn.allow_tf32:
            places += CONVOLUTIONS.get(func, ())
        if torch.backends.cuda.matmul.allow_tf32:
            places += PRODUCTS.get(func, ())
        args = [rounded(x) if i in places else x for i, x in enumerate(args)]
        return func(*args, **(kwargs or {}))


def test_rounding_to_ten_bits():
    x = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 1 + 2**-10, 3e38, 0.0])
    expected = [1 + 2**-10, -1 - 2**-10, 1, 1 + 2**-10]
    assert rounded(x)[:4].tolist() == expected
    assert rounded(x)[5] == 0
    assert rounded(x).isfinite().all()
    random = torch.randn(1000)
    assert ((rounded(random) - random).abs() <= 2**-11 * random.abs()).all()


@pytest.mark.parametrize("rule", ["alternating", "simultaneous", "one_stage"])
@pytest.mark.parametrize("channels_last", ["false", "true"])
def test_float32_is_within_its_tolerance_without_tf32(rule, channels_last):
    with TensorCores():
        found = error("cpu", [f"precision.channels_last={channels_last}"], rule)
    assert found < TOLERANCES["float32"]


@pytest.mark.parametrize("rule", ["alternating", "simultaneous", "one_stage"])
def test_tf32_is_within_its_own_tolerance_only(rule):
    with TensorCores():
        found = error("cpu", ["precision.tf32=true"], rule)
    assert TOLERANCES["float32"] < found < TOLERANCES["tf32"]


@pytest.mark.parametrize("rule", ["alternating", "simultaneous", "one_stage"])
def test_bfloat16_is_within_its_tolerance(rule):
    assert error("cpu", ["precision.dtype=bfloat16"], rule) < TOLERANCES["bfloat16"]
