"""The perceptual term: features of a frozen network from a file."""

import hashlib
import math
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from torch import nn

import gatdist
from conditional_games import SMALL, TRANSLATION
from conditional_runs import RUN, train_translation, write_pairs
from conditional_runs import TRANSLATION as SMALL_TRANSLATION
from gatdist.api import _anchored
from gatdist.bench.step_costs import step_costs
from gatdist.cli import main
from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import load_config
from gatdist.game.scores import Scores
from gatdist.game.terms import Context, build_terms
from support import refused

SIDE = 8


class Stack(nn.Module):
    """Two feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
        first = self.first(images * scale)
        return [first, self.dropout(self.norm(self.second(first.relu())))]


class Mixing(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images - images.mean(0, keepdim=True)


class Drawing(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * torch.rand_like(images)


class Scalar(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean()


class Integers(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.long()


class Means(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3))


class Nothing(nn.Module):
    def forward(self) -> int:
        return 1


class NoForward(nn.Module):
    @torch.jit.export
    def other(self, images: torch.Tensor) -> torch.Tensor:
        return images


class Pools(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_pool2d(images, 64)


def saved(network, file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(file))
    return {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def toml(options):
    """Return an inline table."""
    values = {k: toml(v) if isinstance(v, dict) else repr(v) for k, v in options.items()}
    return "{" + ", ".join(f"{key}={value}" for key, value in values.items()) + "}"


def configured(options, *overrides):
    term = {"weight": 1.0, **options}
    return load_config("digits", [f"game.terms.perceptual={toml(term)}", *overrides])


def term_of(options):
    return build_terms(configured(options), "target", {})[0].term


def context(real, fake):
    return Context({"target": real}, {"target": fake}, Scores((), ()))


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(3)
    return Stack(), tmp_path / "stack.pt"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_the_network(channels, dtype, network):
    plain, file = network
    options = {"pixel_range": [0.0, 255.0], "distance": "l2", "map_weights": [0.5, 2.0]}
    term = term_of({**saved(plain, file), **options, "arguments": {"scale": 0.5}})
    plain.eval().to(dtype)
    real, fake = (torch.rand(5, channels, SIDE, SIDE, dtype=dtype) * 2 - 1 for _ in range(2))
    fake.requires_grad_()
    pixels = [(x * 127.5 + 127.5).expand(-1, 3, -1, -1) for x in (real, fake)]
    (a, b), (c, d) = (plain(each, 0.5) for each in pixels)
    expected = 0.5 * (a - c).square().mean((1, 2, 3)) + 2 * (b - d).square().mean((1, 2, 3))
    for _ in range(4):  # the executor of TorchScript would optimize after some calls
        found = term(context(real, fake))
        torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), fake)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert found.dtype == dtype


def test_network_of_one_map_needs_no_list(tmp_path):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 2, 3)
    term = term_of(saved(layer, tmp_path / "one.pt"))
    real, fake = torch.rand(2, 3, 3, SIDE, SIDE) * 2 - 1
    expected = (layer(fake / 2 + 0.5) - layer(real / 2 + 0.5)).abs().mean((1, 2, 3))
    torch.testing.assert_close(term(context(real, fake)), expected.detach())


def test_map_may_be_one_number_per_sample(tmp_path):
    term = term_of(saved(Means(), tmp_path / "means.pt"))
    real, fake = torch.rand(2, 3, 3, SIDE, SIDE) * 2 - 1
    expected = (fake.mean((1, 2, 3)) - real.mean((1, 2, 3))).abs() / 2
    torch.testing.assert_close(term(context(real, fake)), expected)


def test_digits_of_the_digest_may_be_capitals(network):
    options = saved(*network)
    term_of({**options, "sha256": options["sha256"].upper()})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sha256": "0" * 64}, "game.terms.perceptual.sha256"),
        ({"sha256": ""}, "game.terms.perceptual.sha256"),
        ({"file": ""}, "game.terms.perceptual.file"),
        ({"pixel_range": [1.0]}, "game.terms.perceptual.pixel_range"),
        ({"pixel_range": [1.0, 1.0]}, "game.terms.perceptual.pixel_range"),
        ({"pixel_range": [0.0, math.inf]}, "game.terms.perceptual.pixel_range.1"),
        ({"map_weights": [0.0, 0.0]}, "game.terms.perceptual.map_weights"),
        ({"map_weights": [1.0, -1.0]}, "game.terms.perceptual.map_weights.1"),
        ({"map_weights": [math.nan, 1.0]}, "game.terms.perceptual.map_weights.0"),
        ({"distance": "lpips"}, "game.terms.perceptual.distance"),
        ({"arguments": {"resize": 1}}, "game.terms.perceptual.arguments"),
        ({"arguments": {"images": 1}}, "game.terms.perceptual.arguments"),
        ({"arguments": {"self": 1}}, "game.terms.perceptual.arguments"),
        ({"weights": [1.0]}, "game.terms.perceptual.weights"),
    ],
)
def test_options_that_do_not_fit_are_refused(change, field, network):
    with refused(ConfigError, field):
        term_of({**saved(*network), **change})


def test_file_that_is_no_torchscript_is_refused(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"no network")
    digest = hashlib.sha256(b"no network").hexdigest()
    with refused(ConfigError, "game.terms.perceptual.file"):
        term_of({"file": str(file), "sha256": digest})


@pytest.mark.parametrize("other", [Nothing(), NoForward()])
def test_network_must_take_images(other, tmp_path):
    with refused(ConfigError, "game.terms.perceptual.file"):
        term_of(saved(other, tmp_path / "x.pt"))


def test_reason_of_a_failure_in_the_network_is_shown(tmp_path):
    options = {"weight": 1.0, **saved(Pools(), tmp_path / "x.pt")}
    with refused(PluginError, "game.terms.perceptual") as caught:
        train_translation(tmp_path / "run", f"game.terms.perceptual={toml(options)}")
    assert "Output size is too small" in str(caught.value)


def test_code_does_not_run_before_its_digest_is_checked(network, monkeypatch):
    options = saved(*network)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("ran"))
    with refused(ConfigError, "game.terms.perceptual.sha256"):
        term_of({**options, "sha256": "1" * 64})


@pytest.mark.parametrize(
    ("shape", "options", "field"),
    [
        ((3, SIDE, SIDE), {"map_weights": [1.0]}, "game.terms.perceptual.map_weights"),
        ((3, SIDE, SIDE), {"field": "other"}, "game.terms.perceptual.field"),
        ((2, SIDE, SIDE), {}, "game.terms.perceptual.field"),
        ((1, 100), {}, "game.terms.perceptual.field"),
    ],
)
def test_fields_that_do_not_fit_are_refused(shape, options, field, network):
    term = term_of({**saved(*network), **options})
    with refused(ConfigError, field):
        term(context(*torch.zeros(2, 3, *shape)))


@pytest.mark.parametrize(
    ("network", "error", "field"),
    [
        (Scalar(), ConfigError, "game.terms.perceptual.file"),
        (Integers(), ConfigError, "game.terms.perceptual.file"),
        (Mixing(), PluginError, "game.terms.perceptual"),
        (Drawing(), PluginError, "game.terms.perceptual"),
    ],
)
def test_networks_that_break_the_contract_are_refused_before_training(
    network, error, field, tmp_path
):
    options = {"weight": 1.0, **saved(network, tmp_path / "x.pt")}
    with refused(error, field):
        train_translation(tmp_path / "run", f"game.terms.perceptual={toml(options)}")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_run_continues_with_the_file_in_another_folder(network, tmp_path):
    options = {"weight": 1.0, **saved(*network)}
    run = train_translation(tmp_path / "run", f"game.terms.perceptual={toml(options)}")
    moved = tmp_path / "moved.pt"
    network[1].rename(moved)
    old = configured(options)
    assert old.result_keys() == configured({**options, "file": str(moved)}).result_keys()
    assert old.result_keys() != configured({**options, "sha256": "1" * 64}).result_keys()
    assert gatdist.load(run)  # needs no file of a term


def test_passwords_in_its_url_are_not_recorded():
    options = {"file": "https://me:secret@host/x.pt?token=hidden", "sha256": "0" * 64}
    config = configured(options)
    assert "secret" not in str(config.redacted())
    assert "hidden" not in str(config.redacted())


def test_passwords_in_its_url_are_not_in_tracebacks(tmp_path, capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://me:secret@127.0.0.1:{server.server_port}/none.pt?token=hidden"
        write_pairs(tmp_path / "data")
        options = {"weight": 1.0, "file": url, "sha256": "0" * 64}
        sets = [*RUN, *SMALL_TRANSLATION, f"data.url='{tmp_path}/data'"]
        sets.append(f"game.terms.perceptual={toml(options)}")
        command = ["train", "digits", f"--run-dir={tmp_path}/run", "--local", "--debug"]
        status = main([*command, *(f"--set={each}" for each in sets)])
        server.shutdown()
    assert status != 0
    _, _, found = capsys.readouterr().err.partition("Traceback")  # after the server's own lines
    assert "FileNotFoundError: http://me:***@" in found
    assert "secret" not in found
    assert "hidden" not in found


def test_relative_file_is_that_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = _anchored(configured({"file": "x.pt", "sha256": "0" * 64}))
    assert config.game.terms["perceptual"].options["file"] == str(tmp_path / "x.pt")
    config = _anchored(configured({"file": "s3://bucket/x.pt", "sha256": "0" * 64}))
    assert config.game.terms["perceptual"].options["file"] == "s3://bucket/x.pt"


def test_costs_of_a_step_include_the_network(network):
    options = {"weight": 1.0, **saved(*network)}
    shape, metadata = (3, 32, 32), {"modality": "image", "fields": {"input": (1, 32, 32)}}

    def operators(*overrides):
        config = load_config("digits", [*SMALL, "precision.dtype=float32", *overrides])
        return step_costs(config, shape, 0, metadata, {"": 1})[""].operators

    game = [*TRANSLATION, "data.url=x"]
    more = operators(*game, f"game.terms.perceptual={toml(options)}")
    assert more > operators(*game) + 10
