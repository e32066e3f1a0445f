"""The kernels of gatdist.nn.fused in Triton's interpreter, compared with torch's operators.

Run by test_fused.py in a process with TRITON_INTERPRET=1: Triton reads it when it is imported.
"""

import mmap
import zlib

import pytest
import torch
from torch.nn import functional
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from benchmarks.gpu import correctness
from gatdist import nn
from gatdist.bench.presets import PRESETS
from gatdist.models import build_networks
from gatdist.models.image.resampling import blur, downsample, upsample
from gatdist.nn import fused, kernels
from gatdist.parallel import draws

# Largest error of values and of derivatives, relative to the largest number.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FLOAT, HALF, BFLOAT = TOLERANCES
over_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])


@pytest.fixture(autouse=True, scope="module")
def kernels_on_cpus():
    fused.DEVICES.add("cpu")
    fused._found.clear()
    assert fused.runs_kernels(torch.zeros(1))
    with nn.derivatives_of_gpus():
        yield


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivatives(compute, tensors):
    """The output, its slopes in a direction, and the gradients of a loss with both squared."""
    out = compute(*tensors)
    direction = numbers(*out.shape, seed=9).to(out.dtype)
    slopes = torch.autograd.grad(out, tensors, direction, create_graph=True)
    loss = out.double().square().sum() + sum(s.double().square().sum() for s in slopes)
    seconds = torch.autograd.grad(loss, tensors)
    firsts = torch.autograd.grad(compute(*tensors), tensors, direction)  # without a graph
    return [out, *slopes, *firsts, *seconds]


def compare(found_of, expected_of, tensors, moved, tolerance):
    found = derivatives(found_of, [t.requires_grad_() for t in moved])
    expected = derivatives(expected_of, [t.requires_grad_() for t in tensors])
    errors = {}
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == theirs.shape
        errors[i] = ((mine.double() - theirs).abs().max() / theirs.abs().max()).item()
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize(
    ("dtype", "last", "shape"),
    [
        (FLOAT, False, (2, 5, 7, 3)),
        (FLOAT, True, (2, 5, 7, 3)),
        (HALF, False, (1, 16, 8, 8)),
        (HALF, True, (1, 16, 8, 8)),
        (BFLOAT, False, (2, 9, 17, 17)),  # more than one block of pixels and of channels
        (BFLOAT, True, (2, 70, 5, 9)),
    ],
    ids=str,
)
def test_activation(dtype, last, shape):
    n, c, h, w = shape
    tensors = [numbers(*shape), numbers(n, c), numbers(c), numbers()]
    tensors = [t.to(dtype).double() for t in tensors]
    noise = numbers(n, 2 * h * w)[:, : h * w].view(n, 1, h, w).to(dtype)  # as parts of a row

    def kernel(x, scale, bias, strength):
        return nn.styled_leaky_relu(x, scale, bias, noise, strength, 0.2, 1.5)

    def plain(x, scale, bias, strength):
        x = x * scale[:, :, None, None] + bias[:, None, None] + strength * noise.double()
        return 1.5 * functional.leaky_relu(x, 0.2)

    moved = [t.to(dtype) for t in tensors]
    moved[0] = fused.laid_out(moved[0], last)
    compare(kernel, plain, tensors, moved, TOLERANCES[dtype])


@over_layouts
def test_activation_of_strided_factors(last):
    x = fused.laid_out(numbers(2, 6, 5, 3).float(), last)
    scale, bias = numbers(6, 2).float().T, numbers(12).float()[::2]
    noise, strength = numbers(2, 1, 5, 4).float()[..., :3], torch.tensor(0.5)
    found = nn.styled_leaky_relu(x, scale, bias, noise, strength, 0.2)
    z = x * scale[:, :, None, None] + bias[:, None, None] + strength * noise
    torch.testing.assert_close(found, functional.leaky_relu(z, 0.2))


def test_activation_in_a_checkpoint():
    x = numbers(2, 3, 5, 4).float().requires_grad_()
    (expected,) = torch.autograd.grad(nn.leaky_relu(x, 0.2).sum(), x)
    found = checkpoint(lambda x: nn.leaky_relu(x, 0.2), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], expected)


@over_layouts
def test_activation_alone(last):
    x = numbers(2, 3, 5, 4)
    moved = fused.laid_out(x.float(), last)
    plain = torch.nn.LeakyReLU(0.2)
    compare(lambda x: nn.leaky_relu(x, 0.2), plain, [x], [moved], 2e-6)
    with torch.no_grad():
        torch.testing.assert_close(nn.leaky_relu(moved, 0.2), plain(moved))


RESAMPLING = {
    "upsample": lambda x: upsample(x, 0.5),
    "downsample": lambda x: downsample(x, 2),
    **{f"blur {p}": lambda x, p=p: blur(x, p) for p in range(4)},
}


IN_16_BITS = [("downsample", HALF), ("upsample", BFLOAT)]


@over_layouts
@pytest.mark.parametrize(("name", "dtype"), [(n, FLOAT) for n in RESAMPLING] + IN_16_BITS, ids=str)
def test_resampling(last, name, dtype):
    """Against the operators without Triton, which test_resampling.py compares with matrices."""
    x = numbers(2, 5, 8, 6).to(dtype).double()
    moved = fused.laid_out(x.to(dtype), last)
    compare(RESAMPLING[name], RESAMPLING[name], [x], [moved], TOLERANCES[dtype])


@over_layouts
def test_resampling_to_one_pixel(last):
    """Which has both layouts, whatever that of the input is."""
    for resample, side in ((downsample, 2), (lambda x: blur(x, 0), 4)):
        x = numbers(2, 5, side, side)
        moved = fused.laid_out(x.float(), last)
        compare(resample, resample, [x], [moved], 2e-6)


def test_results_are_not_copied_to_their_layout():
    x = fused.laid_out(torch.randn(2, 16, 4, 4).half(), True)
    weight = torch.randn(16, 16, 1, 1).half()
    with profile() as profiled:
        fused.pointwise(x, weight, None, None, None, 1.0, 1.0, False, False)
        fused.fir(x, 2, 1, 2, 1, 4.0)
    assert "aten::clone" not in {event.key for event in profiled.key_averages()}


@pytest.fixture
def last_program(monkeypatch):
    """Run only the last program of each launch, which touches few pages of large tensors."""
    builder = interpreter.interpreter_builder

    class Kernels:
        def __getattr__(self, name):
            class Launcher:
                def __getitem__(self, grid):
                    (programs,) = grid
                    last = programs - 1, 0, 0
                    here = lambda *index: setattr(builder, "grid_idx", last)  # noqa: E731
                    monkeypatch.setattr(builder, "set_grid_idx", here)
                    return getattr(kernels, name)[(1,)]

            return Launcher()

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(fused, "_kernels", Kernels)


@over_layouts
def test_offsets_of_large_samples(last, last_program):
    """Over 2³¹ numbers in a sample: offsets do not fit int32."""
    x = fused._empty(torch.empty(0, dtype=torch.float16), (1, 2049, 1024, 1024), last)
    x[0, -64:, -1, -64:] = -2.0
    y, signs = fused.activate(x, None, None, None, None, 0.5, 1.0, True)
    assert y[0, -1, -1, -1] == -1
    assert signs[0, -1, -1] == 0
    gradient, _ = fused.activate_gradient(x, signs, None, None, None, 0.5, 1.0, False)
    assert gradient[0, -1, -1, -1] == -1
    x = fused._empty(x, (1, 513, 1024, 1024), last)
    x[0, -64:, -8:, -64:] = 1.0
    y = fused.fir(x, 2, 1, 2, 1, 4.0)
    assert y[0, -1, -1, -2] == 0.75  # next to the border


def test_offsets_of_random_words(last_program):
    blocks = 2**29 + 1
    size = 32 * blocks
    reserves_no_memory = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    words = torch.frombuffer(mmap.mmap(-1, size, reserves_no_memory), dtype=torch.int64)
    positions = torch.tensor([5])
    launch = fused._kernels().philox[(-(-blocks // 256),)]
    launch(positions, words, blocks, 7, 8, 9, 1, BLOCK=256)
    counter = torch.tensor([[blocks - 1], [7], [5], [0]])
    assert torch.equal(words[-4:], draws.philox(counter, (8, 9))[:, 0])


# The interpreter multiplies the bits of bfloat16.
@pytest.mark.parametrize(("channels", "groups"), [(16, 2), (48, 6)])
def test_bottleneck(channels, groups):
    torch.manual_seed(1)  # with 0, float16 changes the sign of a number before an activation
    wide = 2 * channels
    layers = [
        nn.Conv2d(channels, wide, 1),
        nn.Conv2d(wide, wide, 3, padding=1, groups=groups),
        nn.Conv2d(wide, channels, 1, bias=False),
    ]
    names = ["x"] + [
        f"{i}.{name}" for i, layer in enumerate(layers) for name, _ in layer.named_parameters()
    ]
    tensors = [
        numbers(2, channels, 5, 3),
        *(p.detach() for layer in layers for p in layer.parameters()),
    ]
    tensors = [t.half().double() for t in tensors]
    moved = [t.half() for t in tensors]
    moved[0] = fused.laid_out(moved[0], True)
    assert fused.fuses_product(moved[0], layers[0].weight)
    modules = torch.nn.ModuleList(layers)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = modules

        def forward(self, x):
            return nn.bottleneck(x, *self.layers, negative_slope=0.2)

    block = Block()

    def compute(x, *weights):
        named = {f"layers.{name}": weight for name, weight in zip(names[1:], weights, strict=True)}
        return torch.func.functional_call(block, named, (x,))

    def plain(*tensors):
        with fused.without_kernels():
            return compute(*tensors)

    compare(compute, plain, tensors, moved, 1e-2)


SLOW = [pytest.param("stylegan2-256", player, marks=pytest.mark.slow) for player in (0, 1)]


@pytest.mark.parametrize(("preset", "player"), [("r3gan-256", 0), ("r3gan-256", 1), *SLOW])
def test_networks(preset, player):
    """A whole network and a gradient penalty, in float32 and with weights that do not vanish."""
    case = PRESETS[preset].small()
    config = case.config(["precision.dtype=float32"])
    network = build_networks(config, case.shape, 0, case.metadata)[player]
    torch.manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = torch.randn(1, *(case.shape if player else [config.model.latent_size]))
    size = getattr(network, "noise_size", 0)
    noise = [torch.randn(1, size)] if size else []

    def gradients():
        x = inputs.clone().requires_grad_()
        out = network(x, None, *noise)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        loss = slope.square().sum() + out.square().sum()
        weights = list(network.parameters())
        return [out, slope, *torch.autograd.grad(loss, weights, allow_unused=True)]

    found = gradients()
    with fused.without_kernels():
        expected = gradients()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(
                mine, theirs, rtol=2e-3, atol=2e-4 * theirs.abs().max().item()
            )


@pytest.mark.slow
def test_benchmark_of_gpus():
    rows = correctness.run("kernels", torch.device("cpu"))["rows"]
    assert len(rows) == 12
    for row in rows:
        if row["name"] != "residual block, bfloat16, channels last":  # the interpreter's products
            assert row["ok"], row


@pytest.mark.parametrize("count", [1, 4, 7])
def test_random_words(count):
    positions = torch.tensor([0, 5, 2**31 + 3, 2**40 + 1])
    expected = draws.bits(2**62 + 17, "some stream", positions, count)
    found = fused.philox(positions, -(-count // 4), zlib.crc32(b"some stream"), 17, 2**30)
    assert torch.equal(found[:, :count], expected)
