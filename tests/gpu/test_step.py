"""The step on a CUDA device: correct in every precision, without host synchronization."""

import pytest
import torch
from steps import RULES, TOLERANCES, error, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rule", RULES)
def test_cuda_equals_cpu_in_float64(rule):
    overrides = [f"game.update_rule={rule}", "precision.dtype=float64"]
    torch.testing.assert_close(train("cuda", overrides), train("cpu", overrides), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["alternating", "simultaneous", "one_stage"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", ["false", "true"])
def test_every_precision_and_layout_follows_float64(rule, dtype, channels_last):
    overrides = [f"precision.dtype={dtype}", f"precision.channels_last={channels_last}"]
    assert error("cuda", overrides, rule) < TOLERANCES[dtype]


@pytest.mark.parametrize("rule", ["alternating", "simultaneous", "one_stage"])
def test_tf32_follows_float64(rule):
    assert error("cuda", ["precision.tf32=true"], rule) < TOLERANCES["tf32"]


@pytest.mark.parametrize("rule", RULES)
def test_no_host_synchronization_in_a_step(rule):
    train("cuda", [f"game.update_rule={rule}"], strict=True)


@pytest.mark.filterwarnings("ignore")  # caused by torch.compile
@pytest.mark.parametrize("rule", ["alternating", "one_stage"])
def test_compiled_networks_compute_the_same(rule):
    overrides = [f"game.update_rule={rule}", "game.penalties={}"]
    compiled = [*overrides, 'precision.compile=["generator", "discriminator"]']
    torch.testing.assert_close(
        train("cuda", compiled, steps=2), train("cuda", overrides, steps=2), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("rule", RULES)
def test_replayed_steps_equal_eager_steps(rule):
    """Steps with and without the penalty are recorded separately, each after its warm-up."""
    overrides = [f"game.update_rule={rule}", "precision.dtype=float64"]
    torch.testing.assert_close(
        train("cuda", overrides, steps=16, records=True, strict=True),
        train("cuda", overrides, steps=16),
        rtol=0,
        atol=1e-6,  # learning rates are passed in single precision
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_precision_can_be_recorded(dtype):
    overrides = [f"precision.dtype={dtype}", "precision.channels_last=true"]
    reference = train("cuda", ["precision.dtype=float64"], steps=12)
    start = train("cuda", ["precision.dtype=float64"], steps=0)
    found = train("cuda", overrides, steps=12, records=True)
    tolerance = {"float32": 0.05, "bfloat16": 0.4, "float16": 0.2}[dtype]
    assert ((found - reference).norm() / (reference - start).norm()).item() < tolerance
