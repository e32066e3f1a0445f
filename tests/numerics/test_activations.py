"""``gatdist.nn.leaky_relu``: compared with torch's, in value, memory and derivatives."""

import pytest
import torch
from torch.nn import functional

from gatdist.nn import derivatives_of_gpus, leaky_relu

F64 = torch.float64
over_settings = pytest.mark.parametrize(("slope", "gain"), [(0.2, 1.0), (0.2, 2**0.5), (0.0, 3.0)])


@pytest.fixture(autouse=True)
def as_on_gpus():
    with derivatives_of_gpus():
        yield


def plain(x, slope, gain):
    y = functional.leaky_relu(x, slope)
    return y if gain == 1 else y * gain


def numbers(*shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@over_settings
def test_derivatives_are_those_of_differences(slope, gain):
    x = numbers(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(leaky_relu, (x, slope, gain))
    assert torch.autograd.gradgradcheck(leaky_relu, (x, slope, gain))


def penalized(activate, slope, gain, dtype):
    """The output, its gradient, and the gradients of a loss with a gradient penalty."""
    x, w = (numbers(64, 64, dtype=dtype).requires_grad_() for _ in range(2))
    y = activate(x @ w, slope, gain).tanh() @ w
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    loss = gradient.square().sum() + y.square().sum()
    return [y, gradient, *torch.autograd.grad(loss, [x, w])]


@over_settings
def test_gradient_penalties_are_torchs(slope, gain):
    found, expected = (penalized(f, slope, gain, F64) for f in (leaky_relu, plain))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_penalties_without_a_gain_have_the_bits_of_torchs(dtype):
    found, expected = (penalized(f, 0.2, 1.0, dtype) for f in (leaky_relu, plain))
    assert all(map(torch.equal, found, expected))


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_gradient_penalty_takes_three_operators_and_keeps_one_tensor():
    x, direction = (numbers(4, 4).requires_grad_() for _ in range(2))
    kept = set()
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.add(t.data_ptr()) or t, lambda t: t
        ),
        Operators() as operators,
    ):
        y = leaky_relu(x, 0.2)
        (gradient,) = torch.autograd.grad(y, x, direction, create_graph=True)
        torch.autograd.grad(gradient, direction, torch.ones_like(y))
    assert kept == {y.data_ptr()}
    computed = [name for name in operators.names if name not in ("aten::detach", "aten::ones_like")]
    assert computed == ["aten::leaky_relu"] + 2 * ["aten::leaky_relu_backward"]


def test_compiled_networks_use_torchs():
    def backend(module, inputs):
        names = {str(node.target) for node in module.graph.nodes}
        assert any("leaky_relu" in name for name in names)
        return module.forward

    compiled = torch.compile(lambda x: leaky_relu(x, 0.2, 2.0), backend=backend, fullgraph=True)
    x = numbers(3).requires_grad_()
    torch.testing.assert_close(compiled(x), leaky_relu(x, 0.2, 2.0))
