"""Imported published weights give the outputs of the published networks."""

import json
import re

import pytest
import safetensors.torch
import torch

import gatdist
import published_networks as published
from gatdist.cli import main
from gatdist.common.errors import CheckpointError, ConfigError
from support import refused

CLASSES, GROUP = 3, 3


def r3gan(classes):
    widths, blocks = [16, 16, 8], 2
    shapes = published.r3gan_shapes(widths, 8, 8, blocks, classes)
    generator, discriminator = (
        lambda s, x, y, of=of: of(s, x, y, len(widths), blocks)
        for of in (published.r3gan_generator, published.r3gan_discriminator)
    )
    return "r3gan", shapes, (generator, discriminator), 8, 16


def stylegan2(classes):
    sides = (4, 8, 16)
    shapes = published.stylegan2_shapes([8, 8, 4], 6, 8, 2, classes)
    functions = (
        lambda s, z, y: published.stylegan2_generator(s, z, y, sides),
        lambda s, x, y: published.stylegan2_discriminator(s, x, y, sides, GROUP),
    )
    return "stylegan2-ada", shapes, functions, 6, 16


def biggan(width, blocks, attended):
    shapes = published.biggan_shapes(width, blocks, 4, 6, CLASSES, attended)
    functions = (
        lambda s, z, y: published.biggan_generator(s, z, y, blocks),
        lambda s, x, y: published.biggan_discriminator(s, x, y, blocks),
    )
    return "biggan", shapes, functions, 4 * (blocks + 1), 4 << blocks


CASES = {
    "r3gan": lambda: (*r3gan(0), 0),
    "r3gan, conditional": lambda: (*r3gan(CLASSES), CLASSES),
    "stylegan2": lambda: (*stylegan2(0), 0),
    "stylegan2, conditional": lambda: (*stylegan2(CLASSES), CLASSES),
    "biggan at 64": lambda: (*biggan(8, 4, 8), CLASSES),
    "biggan at 128 without attention": lambda: (*biggan(2, 5, 0), CLASSES),
}


def states(shapes):
    """Random state dicts."""
    found = [published.random_state(s, seed) for seed, s in enumerate(shapes)]
    for state in found:
        for name, tensor in state.items():
            if name.endswith("stored_var"):
                tensor.abs_().add_(0.5)
    return found


@pytest.mark.parametrize("case", CASES)
def test_imported_networks_compute_what_the_published_ones_do(case, tmp_path, capsys):
    family, shapes, functions, latent_size, side, classes = CASES[case]()
    files = [tmp_path / "G.safetensors", tmp_path / "D.safetensors"]
    for file, state in zip(files, states(shapes), strict=True):
        safetensors.torch.save_file(state, file)
    options = [
        "--set",
        "precision.dtype=float64",
        "--generator",
        files[0],
        "--discriminator",
        files[1],
        "--run-dir",
        tmp_path / "run",
    ]
    if family == "stylegan2-ada":
        options += ["--set", f"model.discriminator.minibatch_deviation={GROUP}"]
    assert main(["import", family, *map(str, options), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_classes"] == classes
    generator = torch.Generator().manual_seed(9)
    count = 2 * GROUP if family == "stylegan2-ada" else 2
    latents = torch.randn(count, latent_size, generator=generator, dtype=torch.float64)
    images = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % classes if classes else None
    for player, of, state, inputs in zip(
        ("generator", "discriminator"), functions, states(shapes), (latents, images), strict=True
    ):
        network = gatdist.load(str(tmp_path / "run"), player)
        expected = of(state, inputs, labels)
        with torch.no_grad():
            found = network(inputs, labels)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_one_file_may_hold_all_networks_under_their_prefixes(tmp_path):
    _, shapes, *_ = r3gan(0)
    generator, discriminator = states(shapes)
    live = {f"G.{name}": torch.zeros_like(t) for name, t in generator.items()}
    averaged = {f"G_ema.Model.{name}": t for name, t in generator.items()}
    other = {f"D.Model.{name}": t for name, t in discriminator.items()}
    safetensors.torch.save_file({**live, **averaged, **other}, tmp_path / "all.safetensors")
    file, run = tmp_path / "all.safetensors", tmp_path / "run"
    found = gatdist.import_weights("r3gan", file, run, discriminator=file)
    assert found["imported"] == ["discriminator", "generator"]
    finish = gatdist.load(str(run)).network.finish.weight
    assert torch.equal(finish, generator["AggregationLayer.Layer.weight"].float())


def test_imported_runs_are_sampled_and_trained_from(tmp_path):
    from gatdist.config import parse_config

    _, shapes, *_ = r3gan(0)
    for name, state in zip("GD", states(shapes), strict=True):
        torch.save({"state_dict": state}, tmp_path / f"{name}.pth")
    found = gatdist.import_weights(
        "r3gan",
        tmp_path / "G.pth",
        tmp_path / "imported",
        discriminator=tmp_path / "D.pth",
        allow_pickle=True,
    )
    written = gatdist.sample(str(tmp_path / "imported"), 2, out=str(tmp_path / "samples"))
    assert len(written) == 2
    gatdist.pack(str(tmp_path / "samples"), str(tmp_path / "data"), workers=1)
    config = parse_config(
        {
            "run": {"total_samples": 8, "global_batch": 4},
            "data": {"url": str(tmp_path / "data")},
            "model": found["model"] | {"init_from": str(tmp_path / "imported")},
            "evaluate": {"metrics": []},
        }
    )
    assert gatdist.train(config, str(tmp_path / "run"), local=True)["samples_seen"] == 8
    with refused(CheckpointError, "imported"):  # it names no data
        gatdist.evaluate(str(tmp_path / "imported"), ["fid"])
    saved = json.loads((tmp_path / "imported/config.json").read_text())
    saved["data"]["url"] = str(tmp_path / "data")
    saved["run"]["total_samples"] = 8
    with refused(CheckpointError, "imported"):  # it has no optimizer to resume
        gatdist.train(parse_config(saved), str(tmp_path / "imported"), local=True)


def test_pickles_are_refused_unless_allowed_and_never_run_code(tmp_path):
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"G": Hostile()}, tmp_path / "hostile.pth")
    for allowed in (False, True):
        with refused(CheckpointError, "hostile.pth"):
            gatdist.import_weights(
                "r3gan", tmp_path / "hostile.pth", tmp_path / "run", allow_pickle=allowed
            )
    assert not ran.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("AggregationLayer.Layer.weight"),
        lambda state: state.pop("MainLayers.1.Layers.2.NonLinearity1.Bias"),
        lambda state: state.update(more=torch.zeros(2)),
        lambda state: state.update({"MainLayers.0.Layers.0.Basis": torch.zeros(16, 5, 4)}),
        lambda state: state.clear(),
    ],
)
def test_tensors_of_another_network_are_refused(damage, tmp_path):
    _, shapes, *_ = r3gan(0)
    state, _ = states(shapes)
    damage(state)
    safetensors.torch.save_file(state, tmp_path / "G.safetensors")
    with refused(CheckpointError, "G.safetensors"):
        gatdist.import_weights("r3gan", tmp_path / "G.safetensors", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    _, shapes, *_ = r3gan(0)
    state, _ = states(shapes)
    state["MainLayers.0.Layers.0.Basis"].fill_(float("nan"))
    safetensors.torch.save_file(state, tmp_path / "G.safetensors")
    with refused(CheckpointError, "tensor MainLayers.0.Layers.0.Basis"):
        gatdist.import_weights("r3gan", tmp_path / "G.safetensors", tmp_path / "run")


WEIGHT = "MainLayers.0.Layers.1.LinearLayer1.Layer.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(torch.int64),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to(torch.complex64),
        lambda x: x.flatten(1).to_sparse(),
        lambda x: x.to("meta"),
        lambda x: x[:0],
        lambda x: torch.zeros(1).expand(10**13),
    ],
)
def test_tensors_that_hold_no_weights_are_refused_by_name(change, tmp_path):
    state = states(r3gan(0)[1])[0]
    torch.save({**state, WEIGHT: change(state[WEIGHT])}, tmp_path / "G.pth")
    with refused(CheckpointError, f"tensor {WEIGHT}"):
        gatdist.import_weights("r3gan", tmp_path / "G.pth", tmp_path / "run", allow_pickle=True)


def test_weights_of_another_shape_with_as_many_elements_are_refused(tmp_path):
    state = states(r3gan(0)[1])[0]
    safetensors.torch.save_file({**state, WEIGHT: state[WEIGHT].flatten()}, tmp_path / "G")
    with refused(CheckpointError, "G"):
        gatdist.import_weights("r3gan", tmp_path / "G", tmp_path / "run")


def test_pickles_of_endless_tables_are_refused(tmp_path):
    itself = {}
    itself["itself"] = itself
    many = {}
    for _ in range(14):  # 3 ** 14 names
        many = dict.fromkeys("abc", many)
    for tables in (itself, many):
        torch.save(tables, tmp_path / "G.pth")
        with refused(CheckpointError, "G.pth"):
            gatdist.import_weights("r3gan", tmp_path / "G.pth", tmp_path / "run", allow_pickle=True)


@pytest.mark.parametrize(
    "header",
    [
        {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
    ],
)
def test_safetensors_that_torch_can_not_hold_are_refused(header, tmp_path):
    text = json.dumps({"weight": header}).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(header["data_offsets"][1])
    (tmp_path / "G").write_bytes(content)
    with refused(CheckpointError, "G"):
        gatdist.import_weights("r3gan", tmp_path / "G", tmp_path / "run")


def test_resolution_other_than_that_of_the_weights_is_refused(tmp_path):
    _, shapes, *_ = r3gan(0)
    safetensors.torch.save_file(states(shapes)[0], tmp_path / "G.safetensors")
    with refused(ConfigError, "data.resolution"):
        gatdist.import_weights(
            "r3gan",
            tmp_path / "G.safetensors",
            tmp_path / "run",
            overrides=["data.resolution=7"],
        )


def test_unknown_families_and_used_run_directories_are_refused(tmp_path):
    _, shapes, *_ = r3gan(0)
    safetensors.torch.save_file(states(shapes)[0], tmp_path / "G.safetensors")
    with refused(ConfigError, "FAMILY"):
        gatdist.import_weights("pix2pix", tmp_path / "G.safetensors", tmp_path / "run")
    gatdist.import_weights("r3gan", tmp_path / "G.safetensors", tmp_path / "run")
    with refused(CheckpointError, "run"):
        gatdist.import_weights("r3gan", tmp_path / "G.safetensors", tmp_path / "run")


@pytest.mark.parametrize("family", ["r3gan", "stylegan2-ada"])
def test_coarse_layers_are_the_start_of_a_run_at_a_higher_resolution(family, tmp_path):
    from gatdist.config import parse_config
    from gatdist.parallel.communicator import LocalCommunicator
    from gatdist.training.state import TrainState

    _, shapes, *_ = r3gan(0) if family == "r3gan" else stylegan2(0)
    files = [tmp_path / "G.safetensors", tmp_path / "D.safetensors"]
    for file, state in zip(files, states(shapes), strict=True):
        safetensors.torch.save_file(state, file)
    run = tmp_path / "run"
    model = gatdist.import_weights(family, files[0], run, discriminator=files[1])["model"]
    if family == "stylegan2-ada":  # 4 channels at a side of 32, as many as before at 16
        for player in ("generator", "discriminator"):
            model[player]["capacity"] *= 2
    values = {
        "run": {"total_samples": 8, "global_batch": 4},
        "data": {"url": "", "resolution": 32},
        "model": model | {"init_from": str(run), "init_from_strict": False},
        "evaluate": {"metrics": []},
    }
    config = parse_config(values)
    state = TrainState(config, LocalCommunicator(torch.device("cpu")), (3, 32, 32), 0)
    state.start_from_another_run(config, str(tmp_path / "new"))
    layers = {
        "r3gan": (r"stages\.[01]\.|start|basis", r"stages\.[01]\.|basis|finish"),
        "stylegan2-ada": (r"mapping|constant|layers\.[012]\.", r"mix|gather|finish"),
    }[family]
    for player, pattern in zip(("generator", "discriminator"), layers, strict=True):
        before = getattr(found := gatdist.load(str(run), player), "network", found).state_dict()
        after = state.players[player].bare.state_dict()
        names = [name for name in before if re.match(pattern, name)]
        assert names
        assert all(torch.equal(after[name], before[name]) for name in names)
        assert any(name not in before or after[name].shape != before[name].shape for name in after)
