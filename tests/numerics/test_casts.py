"""Weights that are cast once in a phase of a step."""

from collections import Counter

import pytest
import torch

from gatdist.bench.cases import BFLOAT16, SIZES, gatdist_case
from gatdist.nn import Conv2d, conv2d, shared_casts

BF16 = torch.bfloat16


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts casts from float32 to bfloat16 by the memory of what is cast."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == BF16:
            self.count[args[0].data_ptr()] += 1
        return out


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Conv2d(2, 3, 3)


@pytest.fixture
def images():
    return torch.randn(2, 2, 5, 5).to(BF16)


def casts_of(weight, *calls):
    with Casts() as casts, torch.autocast("cpu", BF16):
        for call in calls:
            call()
    return casts.count[weight.data_ptr()]


def test_a_weight_is_cast_once_in_a_block(layer, images):
    twice = [lambda: layer(images)] * 2
    assert casts_of(layer.weight, *twice) == 2
    with shared_casts():
        assert casts_of(layer.weight, *twice) == 1
        assert casts_of(layer.bias, *twice) == 0
    with shared_casts():
        assert casts_of(layer.weight, *twice) == 1


def test_a_changed_weight_is_cast_again(layer, images):
    def change():
        with torch.no_grad():
            layer.weight.add_(1)

    with shared_casts():
        call = lambda: layer(images)  # noqa: E731
        assert casts_of(layer.weight, call, change, call) == 2


def test_casts_without_a_graph_do_not_replace_those_with_one(layer, images):
    with shared_casts(), torch.autocast("cpu", BF16):
        with torch.no_grad():
            layer(images)
        y = layer(images)
        layer.requires_grad_(False)
        assert not layer(images).requires_grad
    layer.requires_grad_()
    y.float().sum().backward()
    assert layer.weight.grad is not None


def test_gradients_of_several_backwards_and_orders_reach_the_weight(layer, images):
    def gradients(block):
        layer.zero_grad()
        with block, torch.autocast("cpu", BF16):
            x = images.clone().requires_grad_()
            layer(images).float().square().sum().backward()
            (of_x,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
            (of_x.float().square().sum() + layer(x).float().sum()).backward()
        return layer.weight.grad

    found, expected = gradients(shared_casts()), gradients(torch.enable_grad())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max())


def test_compiled_functions_cast_by_themselves(images):
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    compiled = torch.compile(conv2d, backend="eager", fullgraph=True)
    with shared_casts(), torch.autocast("cpu", BF16):
        assert compiled(images, weight).dtype == BF16


def test_a_step_casts_weights_once_in_each_phase():
    case = gatdist_case(
        SIZES["residual_w32"],
        BFLOAT16 | {"game": {"loss": "relativistic", "penalties": {"r1": {"strength": 1.0}}}},
    )
    weights = {
        module.weight.data_ptr()
        for network in (case.generator, case.discriminator)
        for module in network.modules()
        if isinstance(module, Conv2d)
    }
    with Casts() as casts:
        case.step()
    assert {casts.count[weight] for weight in weights} == {2}
