"""User code is checked before a run, on every launch path, and errors name its location."""

import gc
import inspect
import itertools
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

import gatdist
from gatdist.cli import main
from gatdist.common.errors import ConfigError, PluginError, UserError
from gatdist.config import load_config
from gatdist.evaluation.features import Extractor, register_feature_extractor
from gatdist.game import UpdateRule, register_update_rule
from gatdist.game.losses import Loss, Sum, register_loss
from gatdist.models import register_discriminator, register_generator
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.inspection import digest
from gatdist.storage import Store
from gatdist.training.loop import run
from gatdist.training.plan import check
from support import refused

LOCAL = LocalCommunicator(torch.device("cpu"))

RING = ["evaluate.metrics=[]", "game.penalties={}"]


class PointDiscriminator(nn.Module):
    """A discriminator of points; subclasses break it."""

    def __init__(self, *, sample_shape, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(sample_shape[0], 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, samples, labels):
        return self.spoil(self.layers(samples)[:, 0])

    def spoil(self, logits):
        return logits


class PointGenerator(nn.Module):
    """A generator of points."""

    def __init__(self, *, latent_size, sample_shape, num_classes):
        super().__init__()
        self.layers = nn.Linear(latent_size, sample_shape[0])

    def forward(self, latents, labels):
        return self.spoil(self.layers(latents))

    def spoil(self, samples):
        return samples


def broken_discriminator(spoil=None, build=None):
    """Return overrides for a discriminator with broken logits, or that is broken when built."""
    return _register_broken(
        register_discriminator, PointDiscriminator, "discriminator", spoil, build
    )


def broken_generator(spoil=None, build=None):
    return _register_broken(register_generator, PointGenerator, "generator", spoil, build)


def _register_broken(register, base, player, spoil, build):
    def builder(**given):
        network = base(**given)
        if spoil:
            network.spoil = spoil
        return (build(network) if build else None) or network

    # The signature that the configuration is checked against.
    builder.__signature__ = inspect.signature(base)
    register("spoiled")(builder)
    return [f'model.{player}={{name="spoiled"}}']


def refusal(overrides, tmp_path, subject, kind=PluginError):
    """Return the message of the error that names ``subject``."""
    with refused(kind, subject) as caught:
        check(load_config("ring", [*RING, *overrides]), str(tmp_path / "run"))
    message = str(caught.value)
    assert "\n" not in message
    assert not (tmp_path / "run").exists()
    return message


def raises(error):
    def spoil(x):
        raise error

    return spoil


OUTPUTS = {
    "list": (lambda x: [x, 3], "list of float32 (2,), int"),
    "tuple": (lambda x: (x.detach().numpy(),), "tuple of ndarray"),
    "features": (lambda x: [[x.mean(), x]], "float32 ()"),
    "dict": (lambda x: {"logits": x}, "dict of float32 (2,)"),
    "None": (lambda x: None, "NoneType"),
    "numpy": (lambda x: x.detach().numpy(), "ndarray"),
    "number": (lambda x: 0.5, "float"),
    "column": (lambda x: x[:, None], "float32 (2, 1)"),
    "several": (lambda x: torch.stack([x, x, x], 1), "float32 (2, 3)"),
    "mean": (lambda x: x.mean(), "float32 ()"),
    "long": (lambda x: x.long(), "int64 (2,)"),
    "bool": (lambda x: x > 0, "bool (2,)"),
    "complex": (lambda x: x.to(torch.complex64), "complex64 (2,)"),
    "meta": (lambda x: x.to("meta"), "meta"),
    "detached": (lambda x: x.detach(), "detach()"),
    "constant": (lambda x: torch.zeros(len(x)), "detach()"),
    "nan": (lambda x: x * torch.nan, "NaN"),
    "infinite": (lambda x: x / 0, "NaN"),
    "value error": (raises(ValueError("first line\nsecond")), "ValueError: first line"),
    "key error": (raises(KeyError("x")), "KeyError: 'x'"),
    "assertion": (raises(AssertionError()), "AssertionError"),
    "attribute error": (lambda x: x.no_such_attribute, "no_such_attribute"),
    "stop iteration": (raises(StopIteration()), "StopIteration"),
    "recursion": (raises(RecursionError("too deep")), "RecursionError: too deep"),
    "exit": (raises(SystemExit(3)), "SystemExit: 3"),
    "generator exit": (raises(GeneratorExit()), "GeneratorExit"),
    "lost connection": (raises(ConnectionError("gloo")), "ConnectionError: gloo"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_user_code_discriminator_output_is_named_before_the_run(case, tmp_path):
    spoil, found = OUTPUTS[case]
    message = refusal(broken_discriminator(spoil), tmp_path, "model.discriminator.name")
    assert found in message
    if case in ("list", "column", "long", "nan", "detached"):
        assert "(2,) on cpu" in message  # the expected output


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda x: x[:1], "float32 (1, 2)"),
        (lambda x: x[:, :1], "float32 (2, 1)"),
        (lambda x: x[:, :, None], "float32 (2, 2, 1)"),
        (lambda x: x.int(), "int32 (2, 2)"),
        (lambda x: [x], "list of float32 (2, 2)"),
        (lambda x: x.detach(), "detach()"),
        (lambda x: x.to_sparse(), "(2, 2)"),
        (raises(TypeError("no")), "TypeError: no"),
    ],
)
def test_user_code_generator_output_is_named_before_the_run(spoil, found, tmp_path):
    assert found in refusal(broken_generator(spoil), tmp_path, "model.generator.name")


def put(name, value):
    return lambda network: setattr(network, name, value)


def first(network):
    return network.layers if isinstance(network.layers, nn.Linear) else network.layers[0]


SHARED = nn.Linear(2, 2)
SHARING = {
    "module": put("twin", SHARED),
    "view as parameter": lambda network: network.register_parameter(
        "twin", nn.Parameter(SHARED.weight.data.view(4)[1:])
    ),
    "view as buffer": lambda network: network.register_buffer("twin", SHARED.weight.detach().t()),
}


class OwnState(PointDiscriminator):
    """Overrides state_dict as the subclass's ``kind`` specifies."""

    kind = "copies"

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        if self.kind == "copies":
            return {key: tensor.clone() for key, tensor in state.items()}
        if self.kind == "renames":
            return {f"own.{key}": tensor for key, tensor in state.items()}
        if self.kind == "lacks":
            return dict(list(state.items())[1:])
        if self.kind == "mixes":
            return {**state, "version": 3}
        raise OSError("no state")


BUILDS = {
    "no module": (lambda network: network.forward, "torch.nn.Module"),
    "class": (lambda network: PointDiscriminator, "PointDiscriminator"),
    "data parallel": (nn.DataParallel, "DataParallel"),
    "lazy": (put("more", nn.LazyLinear(3)), "'more.weight'"),
    "no parameters": (lambda network: nn.Tanh(), ""),
    "all frozen": (lambda network: network.requires_grad_(False), ""),
    "complex": (
        put("more", nn.Parameter(torch.zeros(2, dtype=torch.complex64))),
        "complex64",
    ),
    "integers": (
        put("more", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)),
        "int64",
    ),
    "meta": (put("more", nn.Linear(2, 2, device="meta")), "'meta'"),
    "sparse": (
        lambda network: network.register_buffer("more", torch.eye(2).to_sparse()),
        "torch.sparse_coo",
    ),
    "expanded": (put("more", nn.Parameter(torch.zeros(1).expand(3))), ""),
    "noise size": (put("noise_size", 1.5), "noise_size"),
    "not copied": (put("lock", threading.Lock()), "copy.deepcopy"),
    "weight norm": (
        lambda network: (
            put("more", nn.Linear(2, 2))(network)
            or put("other", torch.ones(2, requires_grad=True) * 2)(network)
        ),
        "copy.deepcopy",
    ),
    **{
        f"state_dict {kind}": (
            lambda network, kind=kind: _of_kind(kind),
            "state_dict",
        )
        for kind in ("copies", "renames", "lacks", "mixes", "fails")
    },
}


def _of_kind(kind):
    network = OwnState(sample_shape=(2,), num_classes=0)
    network.kind = kind
    return network


@pytest.mark.parametrize("case", BUILDS)
def test_user_code_of_a_network_that_cannot_be_trained_is_named(case, tmp_path):
    build, found = BUILDS[case]
    assert found in refusal(broken_discriminator(build=build), tmp_path, "model.discriminator.name")


@pytest.mark.parametrize("mine", SHARING)
@pytest.mark.parametrize("theirs", SHARING)
def test_user_code_networks_that_share_memory_are_named(mine, theirs, tmp_path):
    sets = broken_discriminator(build=SHARING[mine]) + broken_generator(build=SHARING[theirs])
    assert "'twin" in refusal(sets, tmp_path, "model.discriminator.name")


def test_user_code_networks_may_be_views_of_memory_that_does_not_overlap(tmp_path):
    both = torch.zeros(2, 3)
    sets = broken_discriminator(build=put("more", nn.Parameter(both[0])))
    sets += broken_generator(build=put("more", nn.Parameter(both[1])))
    check(load_config("ring", [*RING, *sets]), str(tmp_path / "run"))


def test_user_code_signature_of_a_constructor_is_named(tmp_path):
    @register_discriminator("short")
    class Short(nn.Module):
        def __init__(self, *, sample_shape):
            super().__init__()

    message = refusal(['model.discriminator={name="short"}'], tmp_path, "model.discriminator.name")
    assert "num_classes" in message

    @register_discriminator("fails")
    class Fails(nn.Module):
        def __init__(self, *, sample_shape, num_classes):
            raise ZeroDivisionError("in here")

    message = refusal(['model.discriminator={name="fails"}'], tmp_path, "model.discriminator.name")
    assert "ZeroDivisionError: in here" in message
    assert "test_user_code_contract.py" in message
    register_discriminator("no function")(3)
    refusal(['model.discriminator={name="no function"}'], tmp_path, "model.discriminator.name")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise LookupError("nothing here")


@pytest.mark.parametrize("player", ["discriminator", "generator"])
def test_user_code_that_fails_in_backward_is_named(player, tmp_path):
    overrides = {"discriminator": broken_discriminator, "generator": broken_generator}[player](
        FailsBackward.apply
    )
    assert "nothing here" in refusal(overrides, tmp_path, f"model.{player}.name")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["game.penalties={r1={strength=1.0}}"], "game.penalties.r1"),
        (["game.penalties={r2={strength=1.0}}"], "game.penalties.r2"),
        (["game.penalties={wgan_gp={strength=1.0}}"], "game.penalties.wgan_gp"),
        (["game.update_rule=consensus"], "game.update_rule"),
    ],
)
def test_user_code_without_second_derivatives_is_named_with_local(overrides, field, tmp_path):
    config = load_config(
        "ring", [*RING, *broken_discriminator(lambda x: Once.apply(x).tanh()), *overrides]
    )
    with refused(ConfigError, field):
        gatdist.train(config, str(tmp_path / "run"), local=True)
    assert not (tmp_path / "run").exists()


def test_user_code_gradient_that_is_not_finite_is_named(tmp_path):
    def spoil(x):
        return x + (x - x.detach()).abs().sqrt()  # of 0: the derivative is NaN

    refusal(broken_discriminator(spoil), tmp_path, "model.discriminator.name")


def test_user_code_without_half_precision_is_named(tmp_path):
    def spoil(x):
        assert x.dtype == torch.float32, x.dtype
        return x

    overrides = [*broken_discriminator(spoil), "precision.dtype=bfloat16"]
    assert "torch.bfloat16" in refusal(overrides, tmp_path, "model.discriminator.name")


@pytest.mark.parametrize("n", [1, 3])
def test_user_code_that_accepts_some_batch_sizes_only_is_named(n, tmp_path):
    def spoil(x):
        if len(x) == n:
            raise ValueError("not so many")
        return x

    assert "ValueError: not so many" in refusal(
        broken_generator(spoil), tmp_path, "model.generator.name"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x - x.mean(),
        lambda x: x / len(x),
        lambda x: x + x.flip(0),
        lambda x: x.cumsum(0),
        lambda x: x * x.softmax(0),
    ],
)
def test_user_code_that_couples_samples_is_found_if_batches_are_split(spoil, tmp_path):
    overrides = broken_discriminator(spoil)
    check(load_config("ring", [*RING, *overrides]), str(tmp_path / "run"))
    for more, field in (
        ("cluster.workers=2", "model.discriminator.name"),
        ("run.reduction=canonical", "model.discriminator.name"),
        ("optim.generator.micro_batch=8", "model.discriminator.name"),
        ("game.update_rule=one_stage", "game.update_rule"),
    ):
        assert "layer '' (PointDiscriminator)" in refusal(
            [*overrides, more], tmp_path, field, ConfigError
        )


def test_user_code_gets_labels_only_if_conditional(tmp_path):
    """Data with labels: an unconditional network gets None, in training and sampling."""

    class Labelled(nn.Module):
        def __init__(self, *, latent_size, sample_shape, num_classes):
            super().__init__()
            self.shape, self.layers = sample_shape, nn.Linear(latent_size, 64)

        def forward(self, latents, labels):
            assert labels.dtype == torch.int64
            return self.layers(latents).view(-1, *self.shape)

    register_generator("labelled")(Labelled)
    settings = [*RING, 'model.generator={name="labelled"}']
    with refused(PluginError, "model.generator.name"):
        check(load_config("digits", [*settings, "model.conditional=false"]), str(tmp_path / "run"))
    check(load_config("digits", [*settings, "model.conditional=true"]), str(tmp_path / "run"))


def test_user_code_changes_of_parameters_and_nonpersistent_buffers_are_named(tmp_path):
    class Clips(PointDiscriminator):
        def spoil(self, logits):
            for parameter in self.parameters():
                parameter.data.clamp_(-0.01, 0.01)
            return logits

    class Fleeting(PointDiscriminator):
        def __init__(self, **given):
            super().__init__(**given)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def spoil(self, logits):
            self.seen += 1
            return logits

    class Grows(PointDiscriminator):
        def __init__(self, **given):
            super().__init__(**given)
            self.register_buffer("queue", torch.zeros(0))

        def spoil(self, logits):
            self.queue = torch.cat([self.queue, logits.detach()])
            return logits

    for kind, found in ((Clips, "'layers"), (Fleeting, "'seen'"), (Grows, "'queue'")):

        def build(*, sample_shape, num_classes, kind=kind):
            return kind(sample_shape=sample_shape, num_classes=num_classes)

        build.__signature__ = inspect.signature(PointDiscriminator)
        register_discriminator(kind.__name__)(build)
        sets = [f'model.discriminator={{name="{kind.__name__}"}}']
        assert found in refusal(sets, tmp_path, "model.discriminator.name")


def test_user_code_values_out_of_range_are_warned_of(tmp_path):
    class Bright(nn.Module):
        def __init__(self, *, latent_size, sample_shape, num_classes):
            super().__init__()
            self.shape, self.layers = sample_shape, nn.Linear(latent_size, 64)

        def forward(self, latents, labels):
            return 255 * self.layers(latents).sigmoid().view(-1, *self.shape)

    register_generator("bright")(Bright)
    config = load_config("digits", [*RING, 'model.generator={name="bright"}'])
    warnings = check(config, str(tmp_path / "run")).warnings
    assert any("[-1, 1]" in warning for warning in warnings)


AUDIO = {
    "tied parameters": lambda network: put("twin", first(network))(network),
    "frozen part": lambda network: first(network).requires_grad_(False) and None,
    "counting buffers": lambda network: network.register_buffer(
        "n", torch.zeros(2, dtype=torch.int64)
    ),
    "masking buffers": lambda network: network.register_buffer(
        "m", torch.ones(2, dtype=torch.bool)
    ),
    "weight norm": lambda network: nn.utils.parametrizations.weight_norm(first(network)) and None,
    "orthogonal": lambda network: nn.utils.parametrizations.orthogonal(first(network)) and None,
    "not contiguous": lambda network: put("weight", nn.Parameter(torch.randn(2, 8).T))(
        first(network)
    ),
    "unused": put("more", nn.Linear(3, 3)),
    "own train": put("note", {"name": "x"}),
}


@pytest.mark.parametrize("case", AUDIO)
def test_user_code_that_is_valid_trains_and_resumes_and_samples(case, tmp_path):
    overrides = [
        *RING,
        *broken_discriminator(build=AUDIO[case]),
        "run.global_batch=16",
        "monitor.tensorboard=false",
    ]
    config = load_config("ring", [*overrides, "run.total_samples=128"])
    runs = [Store(str(tmp_path / name)) for name in ("resumed", "whole")]
    polls = itertools.count()
    outcome = run(config, LOCAL, runs[0], should_stop=lambda: next(polls) == 3)
    assert outcome["status"] == "interrupted"
    for store in runs:
        assert run(config, LOCAL, store)["status"] == "finished"
    assert digest(runs[0].url) == digest(runs[1].url)
    assert isinstance(gatdist.load(runs[0].url, "discriminator"), nn.Module)


LOSSES = {
    "mean": ({"generator": lambda r, f: -f.mean()}, "float64 ()"),
    "tuple": ({"generator": lambda r, f: (f, f)}, "tuple"),
    "none": ({"discriminator": lambda r, f: None}, "NoneType"),
    "fails": ({"discriminator": raises(ValueError("no"))}, "TypeError"),
    "detached": ({"generator": lambda r, f: -f.detach()}, "generator"),
    "no logits": ({"generator": lambda r, f: r}, "generator"),
    "nan": ({"generator": lambda r, f: f * torch.nan}, "generator"),
    "integers": ({"generator": lambda r, f: f.long()}, "int64 (4,)"),
    "reads real": ({"generator": lambda r, f: r - f}, "generator_reads_real"),
    "ratio": ({"ratio": lambda r, f: f}, "ratio"),
    "zero sum": ({"zero_sum": True, "generator": lambda r, f: -2 * f}, "zero_sum"),
    "half": (
        {"discriminator": Sum(real=lambda r: r.sum(), fake=lambda f: f)},
        "discriminator.real",
    ),
    "callable": ({"generator": 3}, "TypeError"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_user_code_of_a_loss_is_named_before_the_run(case, tmp_path):
    given, found = LOSSES[case]
    plain = {"discriminator": lambda r, f: f - r, "generator": lambda r, f: -f}
    register_loss("own", Loss(**(plain | given)))
    assert found in refusal(["game.loss=own"], tmp_path, "game.loss")


def test_user_code_of_an_update_rule_is_named_before_the_run(tmp_path):
    from gatdist.game import Phase

    def rule(name, phases, **more):
        register_update_rule(name)(type(name, (UpdateRule,), {"phases": phases, **more}))
        return [f"game.update_rule={name}"]

    def plain(batch):
        return {}

    def fails(self, game, config):
        raise RuntimeError("in the constructor")

    bad = [
        (rule("none", lambda self, step: None), "TypeError"),
        (rule("numbers", lambda self, step: [1]), " int"),
        (rule("raising", raises_step), "IndexError: no step"),
        (
            rule("strangers", lambda self, s: [Phase("x", ("critic",), s.batch, plain)]),
            "('critic',)",
        ),
        (
            rule(
                "observing",
                lambda self, s: [Phase("x", ("generator",), s.batch, lambda batch: {"a": 1.0})],
            ),
            "'a'",
        ),
        (rule("failing", lambda self, step: [], __init__=fails), "in the constructor"),
    ]
    for overrides, found in bad:
        assert found in refusal(overrides, tmp_path, "game.update_rule")
    register_update_rule("three")(3)
    refusal(["game.update_rule=three"], tmp_path, "game.update_rule")


def raises_step(self, step):
    raise IndexError("no step")


@pytest.mark.parametrize(
    ("features", "found"),
    [
        (lambda samples: None, "NoneType"),
        (lambda samples: samples.double(), "float64 (2, 2)"),
        (lambda samples: samples[:1], "float32 (1, 2)"),
        (lambda samples: samples.sum(1), "float32 (2,)"),
        (raises(OSError("no file")), "OSError: no file"),
    ],
)
def test_user_code_of_a_feature_extractor_is_named_before_the_run(features, found, tmp_path):
    @register_feature_extractor("own")
    class Own(Extractor):
        def __init__(self, dataset, comm):
            pass

        @property
        def num_features(self):
            return 2

        def __call__(self, samples):
            return features(samples)

    more = ['evaluate.metrics=["fid"]', 'evaluate.features="own"']
    assert found in refusal(more, tmp_path, "evaluate.features")


def test_user_code_is_checked_identically_on_every_launch_path(tmp_path, monkeypatch, capsys):
    """``--local``, Ray, ``--dry-run`` and Python give the same message, status 2, no traceback."""
    (tmp_path / "lists.py").write_text(
        "import torch\n"
        "from gatdist import register_discriminator\n"
        "@register_discriminator('lists')\n"
        "class Lists(torch.nn.Linear):\n"
        "    def __init__(self, *, sample_shape, num_classes):\n"
        "        super().__init__(sample_shape[0], 1)\n"
        "    def forward(self, samples, labels):\n"
        "        return [super().forward(samples), 3]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sets = ["--set", 'plugins=["lists"]', "--set", 'model.discriminator={name="lists"}']
    message = set()
    for way in (["--local"], ["--workers", "2"], ["--dry-run"]):
        assert main(["train", "ring", "--run-dir", "runs/x", *way, *sets]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        message.add(error)
    assert len(message) == 1
    with pytest.raises(UserError) as caught:
        gatdist.train(load_config("ring", sets[1::2]), "runs/x", local=True)
    assert str(caught.value) in message.pop()
    assert not (tmp_path / "runs").exists()
    assert main(["train", "ring", "--run-dir", "runs/x", "--local", "--debug", *sets]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_user_code_check_does_not_change_the_random_generators_of_the_process(tmp_path):
    def states():
        of_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return random.getstate(), of_numpy, torch.get_rng_state().tolist()

    before = states()
    overrides = [
        *RING,
        *broken_discriminator(nn.Dropout()),
        "run.total_samples=256",
        "monitor.tensorboard=false",
    ]
    gatdist.train(load_config("ring", overrides), str(tmp_path / "run"), local=True)
    gc.collect()
    assert states() == before
