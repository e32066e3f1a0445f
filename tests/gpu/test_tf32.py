"""The tolerances of the GPU tests, on CPUs with TF32 emulated."""

import pytest
import torch
from steps import TOLERANCES, error

from tensor_cores import TensorCores, rounded


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
