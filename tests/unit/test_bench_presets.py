"""The hand-written step and the published operators compute what gatdist's own step does."""

from dataclasses import replace

import pytest
import torch

from gatdist.bench.cases import GatdistCase
from gatdist.bench.handwritten import HandWritten
from gatdist.bench.presets import PRESETS
from gatdist.bench.published import with_published_operators
from gatdist.config import preset_names
from gatdist.models.layers import latents_from
from gatdist.nn import derivatives_of_gpus
from gatdist.parallel import draws

CPU = torch.device("cpu")
F64 = ["precision.dtype=float64", "precision.channels_last=false"]


def keyed(case):
    """Make a hand-written step draw gatdist's random numbers."""
    config, dtype = case.config, case.rows.real.dtype

    def latents(stream, positions):
        drawn = normal(stream, positions, [config.model.latent_size])
        return latents_from(drawn, config.model.latent_distribution)

    def normal(stream, positions, shape):
        return draws.normal(config.run.seed, stream, positions, shape, dtype)

    def uniform(stream, positions, shape):
        return draws.uniform(config.run.seed, stream, positions, shape, dtype)

    case.latents, case.normal, case.uniform = latents, normal, uniform
    return case


def both(name, settings=F64):
    """Return gatdist's case of a small preset, and the hand-written one."""
    case = PRESETS[name].small()
    config = case.config(settings)
    real, labels = case.real(config, CPU), case.labels(config, CPU)
    known = {"num_classes": case.classes, "metadata": case.metadata}
    theirs = keyed(case.hand_written(config, CPU, case.networks(config)))
    inputs = case.inputs(config, CPU)
    return GatdistCase(config, real, labels=labels, inputs=inputs, **known), theirs


def difference(mine, theirs):
    return max(
        (a - b).abs().max().item()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
    )


# Small, their steps differ from those of another preset in schedules only.
ALIKE = {"r3gan-64", "r3gan-imagenet-32", "r3gan-imagenet-64", "sngan-64", "sngan-128"}
ALIKE |= {"hifigan-v2", "hifigan-v3"}


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ALIKE])
def test_weights_after_steps_are_those_of_the_hand_written_loop(name):
    mine, theirs = both(name)
    pairs = [
        (mine.generator, theirs.generator),
        (mine.discriminator, theirs.discriminator),
        (mine.state.average.network, theirs.average),
    ]
    assert all(difference(a, b) == 0 for a, b in pairs)
    start = [p.clone() for p in theirs.generator.parameters()]
    for _ in range(3):
        mine.step()
        theirs.step()
    assert max(difference(a, b) for a, b in pairs) <= 1e-10
    moved = [(a - b).abs().max() for a, b in zip(theirs.generator.parameters(), start, strict=True)]
    assert max(moved) > 1e-5
    state = mine.state.tensors()
    if theirs.augmentation is not None:
        for key, tensor in theirs.augmentation.tensors.items():
            torch.testing.assert_close(tensor, state[f"game/augmentation/{key}"])
    if "path_length" in theirs.config.game.penalties:
        torch.testing.assert_close(theirs.mean_length, state["game/averages/path_length"])


def test_every_preset_has_a_case():
    assert PRESETS.keys() == set(preset_names())


def seconds(network, arguments):
    """Return the outputs, and the derivatives of their squared slopes by inputs and parameters."""
    inputs = arguments[0].detach().requires_grad_()
    outputs = network(inputs, *arguments[1:])
    projected = outputs.reshape(len(outputs), -1) @ torch.linspace(
        -1, 1, outputs[0].numel(), dtype=outputs.dtype
    )
    (slope,) = torch.autograd.grad(projected.sum(), inputs, create_graph=True)
    tensors = [inputs, *network.parameters()]
    found = torch.autograd.grad(slope.square().sum(), tensors, materialize_grads=True)
    return [outputs, *found]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("name", "by_sample"),
    [
        ("r3gan-256", False),
        ("stylegan2-256", False),
        ("stylegan2-256", True),
        ("wavegan-16384", False),
    ],
)
def test_published_operators_have_the_outputs_and_second_derivatives(name, by_sample, labelled):
    case = PRESETS[name].small()
    config = case.config([*F64, f"model.conditional={'true' if labelled else 'false'}"])
    generator, discriminator = replace(case, classes=4 * labelled).networks(config)
    torch.manual_seed(0)
    n, f64 = 8, torch.float64
    for parameter in [*generator.parameters(), *discriminator.parameters()]:
        parameter.data += 0.1 * torch.randn_like(parameter)  # some start at zero
    labels = torch.arange(n) % 4 if labelled else None
    noise = getattr(generator, "noise_size", 0)
    latents = torch.randn(n, config.model.latent_size, dtype=f64)
    for network, arguments in (
        (generator, [latents, labels] + [torch.randn(n, noise, dtype=f64)] * bool(noise)),
        (discriminator, [torch.rand(n, *case.shape, dtype=f64), labels]),
    ):
        expected = seconds(network, arguments)
        with derivatives_of_gpus():
            as_on_gpus = seconds(network, arguments)
        published = with_published_operators(network, by_sample=by_sample)
        assert type(published) is not type(network) or name == "wavegan-16384"
        found = seconds(published, arguments)
        assert max(t.abs().max() for t in expected[1:]) > 1e-3
        for mine, gpu, theirs in zip(expected, as_on_gpus, found, strict=True):
            scale = max(1, theirs.abs().max().item())
            assert (mine - theirs).abs().max() <= 1e-10 * scale
            assert (gpu - theirs).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("name", ["r3gan-256", "stylegan2-256", "wavegan-16384"])
def test_published_operators_have_no_convolutions_of_gatdist(name, monkeypatch):
    mine, theirs = both(name)
    networks = (with_published_operators(each) for each in (theirs.generator, theirs.discriminator))
    published = HandWritten(theirs.config, theirs.rows.real, tuple(networks))

    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr(torch, "convolution", refuse)
    published.step()
    with pytest.raises(AssertionError):
        mine.step()
