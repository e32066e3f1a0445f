"""``gatdist.nn``: convolutions with efficient derivatives, compared with torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from gatdist import nn as efficient
from gatdist.models.layers import add_spectral_norm
from gatdist.nn import derivatives

F64 = torch.float64


@pytest.fixture(autouse=True)
def efficient_on_cpus():
    with efficient.derivatives_of_gpus():
        yield


def tensors(axes, transposed, groups, kernel=3, sides=(7, 6)):
    """Inputs with 4 channels, weights for 6, and biases."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, *sides[:axes], dtype=F64, requires_grad=True)
    channels = (4, 6 // groups) if transposed else (6, 4 // groups)
    weight = torch.randn(*channels, *[kernel] * axes, dtype=F64, requires_grad=True)
    bias = torch.randn(6, dtype=F64, requires_grad=True)
    return x, weight, bias


FUNCTIONS = {
    "conv1d": (1, False),
    "conv2d": (2, False),
    "conv_transpose1d": (1, True),
    "conv_transpose2d": (2, True),
}
OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": 3, "groups": 2},
    {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
]


def third_order(of, x, weight, bias):
    """The output, its gradients, those of a gradient penalty, and of its gradients' squares."""
    y = of(x, weight, bias)
    (gradient,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    penalty = gradient.square().sum() + y.square().sum()
    second = torch.autograd.grad(penalty, [x, weight, bias], create_graph=True)
    total = sum(g.square().sum() for g in second)
    return [y, *second, *torch.autograd.grad(total, [x, weight, bias])]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_three_orders_equal_torchs(name, options):
    axes, transposed = FUNCTIONS[name]
    given = tensors(axes, transposed, options.get("groups", 1))
    found = third_order(lambda *a: getattr(efficient, name)(*a, **options), *given)
    expected = third_order(lambda *a: getattr(functional, name)(*a, **options), *given)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_are_those_of_differences(name):
    axes, transposed = FUNCTIONS[name]
    given = tensors(axes, transposed, 2, sides=(4, 3))
    options = {"stride": 2, "padding": 1, "groups": 2}
    assert torch.autograd.gradgradcheck(lambda *a: getattr(efficient, name)(*a, **options), given)


def test_channels_last_inputs_have_the_same_derivatives():
    x, weight, bias = tensors(2, False, 1)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = third_order(efficient.conv2d, x, weight, bias)
    for mine, theirs in zip(
        third_order(efficient.conv2d, last, weight, bias), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"])
@pytest.mark.parametrize("normalized", [False, True])
def test_modules_replace_those_of_torch(kind, normalized):
    options = {"stride": 2, "padding": 1, "groups": 2}
    if "Transpose" in kind:
        options["output_padding"] = 1
    mine, theirs = (
        getattr(efficient, kind)(4, 6, 3, **options),
        getattr(nn, kind)(4, 6, 3, **options),
    )
    assert isinstance(mine, getattr(nn, kind))
    theirs.load_state_dict(mine.state_dict())
    if normalized:
        for module in (mine, theirs):
            torch.manual_seed(1)
            add_spectral_norm(module)
    x = torch.randn(2, 4, *[9] * int(kind[-2]))
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_padding_modes_and_names_are_those_of_torch():
    for options in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        mine, theirs = efficient.Conv2d(4, 6, 3, **options), nn.Conv2d(4, 6, 3, **options)
        theirs.load_state_dict(mine.state_dict())
        x = torch.randn(2, 4, 8, 8)
        assert torch.equal(mine(x), theirs(x))


def test_autocast_applies():
    layer = efficient.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), nn.Conv2d.forward(layer, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_weights_of_frozen_layers_get_no_gradient():
    layer = efficient.Conv2d(4, 6, 3).requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the largest side of any convolution's kernel."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.largest = max(self.largest, *args[1].shape[2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plain", [False, True])
def test_no_convolution_has_a_kernel_of_the_image(plain, monkeypatch):
    if plain:  # torch's own, which have
        monkeypatch.setattr(derivatives, "_plain", {"cpu"})
    layer = efficient.Conv2d(4, 4, 3, padding=1, groups=2)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with Kernels() as kernels:
        (gradient,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert (kernels.largest >= 14) == plain


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts weight gradients."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("asked", "count"), [("x", 0), ("twice x", 0), ("x.grad", 0), ("weight", 1), ("weight.grad", 1)]
)
def test_only_the_gradients_that_are_asked_for_are_computed(asked, count):
    x, weight, bias = tensors(2, False, 1)
    other = 2 * x
    y = efficient.conv2d(other, weight, bias)
    with Counter() as counter:
        if asked.endswith(".grad"):
            y.sum().backward(inputs=[x if asked == "x.grad" else weight])
        else:
            torch.autograd.grad(y.sum(), {"x": x, "twice x": other, "weight": weight}[asked])
    assert counter.count == count


def test_generated_weights_get_gradients_by_what_generates_them():
    x, weight, bias = tensors(2, False, 1)
    style = torch.ones((), dtype=F64, requires_grad=True)
    y = efficient.conv2d(x, weight * style, bias)
    (found,) = torch.autograd.grad(y.sum(), style)
    torch.testing.assert_close(found, (y - bias[:, None, None]).sum())


def test_plain_convolutions_of_a_penalized_network_are_reported_on_gpus(tmp_path, monkeypatch):
    from gatdist.config import load_config
    from gatdist.models import discriminators
    from gatdist.training.plan import check

    class Plain(nn.Module):
        def __init__(self, *, sample_shape, num_classes):
            super().__init__()
            self.first = nn.Conv2d(sample_shape[0], 4, 3)
            self.finish = nn.Linear(4, 1)

        def forward(self, x, labels=None):
            return self.finish(self.first(x).tanh().mean((2, 3)))[:, 0]

    monkeypatch.setitem(discriminators._entries, "plain", Plain)
    overrides = ['model.discriminator={name="plain"}', "evaluate.metrics=[]"]

    def slow(*more):
        warnings = check(load_config("digits", [*overrides, *more]), str(tmp_path / "run")).warnings
        return [text for text in warnings if "gatdist.nn" in text]

    assert slow() == []  # on CPUs
    (found,) = slow("cluster.gpus_per_worker=1")
    assert "'first'" in found
    assert slow("cluster.gpus_per_worker=1", "game.penalties={}") == []


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_padding_by_name_and_by_values_has_efficient_derivatives(padding_mode, dilation):
    options = {"padding": "same", "padding_mode": padding_mode, "dilation": dilation, "dtype": F64}
    mine, torchs = (of.Conv2d(4, 6, (2, 3), **options) for of in (efficient, nn))
    torchs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 4, 7, 6, dtype=F64, requires_grad=True)
    found = third_order(lambda x, *_: mine(x), x, *mine.parameters())
    expected = third_order(lambda x, *_: torchs(x), x, *torchs.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert "_Convolution" in type(mine(x).grad_fn).__name__


@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose2d"])
def test_a_sample_needs_no_batch(name):
    layer = getattr(efficient, name)(4, 6, 3)
    x = torch.randn(1, 4, 7, 6)[..., : 1 if "1d" in name else 6].squeeze(-1)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_function_transforms():
    x, weight = torch.randn(2, 4, 7, 6), torch.randn(6, 4, 3, 3)

    def gradients(of):
        def loss(weight, x):
            return efficient.leaky_relu(of(x[None], weight)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)

    torch.testing.assert_close(gradients(efficient.conv2d), gradients(functional.conv2d))
