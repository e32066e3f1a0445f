"""``gatdist bench step``: all cases train the same game, and all results are printed."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from gatdist.bench import cases as cases_module
from gatdist.bench import step as step_module
from gatdist.bench.cases import BFLOAT16, FAMILY_SIZES, RULES, SIZES, Case, Size, gatdist_case
from gatdist.bench.memory import measure_memory
from gatdist.bench.peers import PEERS
from gatdist.bench.processes import together
from gatdist.bench.reference import Bare, BareReusing, Plain, reference_networks
from gatdist.bench.rounds import (
    Seconds,
    compare,
    interleave,
    settled,
    speed,
    steps_in_a_turn,
    timed,
)
from gatdist.bench.step import CASES, measure, table
from gatdist.bench.two_processes import TWO_PROCESSES
from gatdist.cli import main
from gatdist.common.errors import ConfigError, GatdistError, WorkerLostError
from gatdist.models import build_networks
from gatdist.parallel import draws
from support import refused

TINY = Size("tiny", "dcgan", {"width": 2}, (1, 16, 16), 4)


def peer(name):
    reason = f"{name} is not installed (pip install 'gatdist[bench]')"
    return pytest.param(
        PEERS[name], marks=pytest.mark.skipif(find_spec(name) is None, reason=reason)
    )


@pytest.fixture(autouse=True)
def what_peers_set(monkeypatch):
    """Restore variables that peers set when they are imported."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@pytest.fixture
def tiny(monkeypatch):
    """Use sizes of milliseconds, and turns of one step."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(step_module, "measure", partial(measure, turn_s=0.0))


# Families


@pytest.mark.parametrize("size", FAMILY_SIZES, ids=lambda size: size.name)
def test_reference_network_is_the_same_function(size):
    config = size.config({"model": dict(size.model) | {"spectral_norm": []}})
    torch.manual_seed(0)
    built = build_networks(config, size.shape, 0)
    torch.manual_seed(0)
    theirs = reference_networks(config, size.shape)
    real, latents = size.real(config)[:2], torch.randn(2, config.model.latent_size)
    for mine, other, x in zip(built, theirs, (latents, real), strict=True):
        noise = ()
        if count := getattr(mine, "noise_size", 0):
            torch.manual_seed(1)
            noise = (None, torch.randn(2, count))
            for name, parameter in [*mine.named_parameters(), *other.named_parameters()]:
                if name.endswith("noise_strength"):
                    torch.nn.init.ones_(parameter)
        torch.manual_seed(1)
        torch.testing.assert_close(other(x), mine(x, *noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", FAMILY_SIZES, ids=lambda size: size.name)
def test_families_take_steps(size):
    for case in (Bare(size), gatdist_case(size, RULES["alternating_kept"])):
        case.run(1)
        for network in (case.generator, case.discriminator):
            assert all(p.isfinite().all() for p in network.parameters())


def test_reference_network_has_torchs_spectral_norm():
    size = next(size for size in FAMILY_SIZES if size.name == "sngan32")
    _, theirs = reference_networks(size.config({}), size.shape)
    weights = [name for name, _ in theirs.named_parameters() if "weight" in name]
    assert all("parametrizations" in name for name in weights)
    assert any(type(m).__name__ == "_SpectralNorm" for m in theirs.modules())


# The same game


@pytest.mark.parametrize(
    "build",
    [
        Bare,
        BareReusing,
        partial(Plain, wrap=lambda network: network),
        peer("lightning"),
        peer("accelerate"),
    ],
)
def test_references_end_where_gatdists_alternating_step_ends(build, monkeypatch):
    monkeypatch.setattr(cases_module, "LEARNING_RATE", 1e-3)
    case, reference = gatdist_case(TINY, RULES["alternating"]), build(TINY)
    start = {name: p.clone() for name, p in reference.generator.named_parameters()}
    drawn = [
        draws.normal(0, "latents", torch.arange(4) + 4 * step, (64,), torch.float32)
        for step in range(3)
    ]
    monkeypatch.setattr(reference, "latents", partial(next, iter(drawn)), raising=False)
    # A trainer takes a step before and one after those that it counts, the others one before.
    reference.run(1 if type(reference).__name__ == "Lightning" else 2)
    case.run(2)
    for player in ("generator", "discriminator"):
        mine = dict(getattr(case, player).named_parameters())
        for name, parameter in getattr(reference, player).named_parameters():
            torch.testing.assert_close(
                parameter, mine[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    moved = [(p - start[name]).abs().max() for name, p in reference.generator.named_parameters()]
    assert min(moved) > 5e-4  # so the tolerance is a small fraction of it


@pytest.mark.parametrize("name", RULES)
def test_gatdist_cases_take_real_steps(name):
    case = gatdist_case(TINY, RULES[name])
    before = torch.cat([p.detach().flatten().clone() for p in case.generator.parameters()])
    assert case.run(2).wall > 0
    assert case.state.samples_seen == 3 * TINY.batch
    assert int(case.state.guard.tensors["nonfinite"]) == 0
    after = torch.cat([p.detach().flatten() for p in case.generator.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_bare_loop_supports_bfloat16():
    case = Bare(TINY, BFLOAT16)
    case.run(1)
    assert case.real.is_contiguous(memory_format=torch.channels_last)
    assert all(p.isfinite().all() for p in case.generator.parameters())


# Turns and ratios


def test_cases_take_turns_in_changing_order_and_the_first_round_is_dropped():
    order, messages = [], []

    def turn(name):
        order.append(name)
        return float(len(order))

    with settled():
        seconds = interleave("abc", 4, turn, messages.append)
    assert messages[1:] == [f"round {n} of 4" for n in range(1, 5)]
    rounds = [order[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert all(len(taken) == 4 and min(taken) > 3 for taken in seconds.values())


def test_ratio_compares_times_of_the_same_round():
    ratio = compare([1.0, 10.0, 3.0], [2.0, 10.0, 12.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 4.0)
    assert steps_in_a_turn(0.03, 1.5) == 50
    assert steps_in_a_turn(7.0, 1.5) == 1


def test_cpu_time_is_that_of_this_process_per_step():
    waiting, working = timed(lambda: time.sleep(0.2)), timed(busy)
    assert waiting.cpu < 0.1 < 0.2 <= waiting.wall
    assert working.cpu == pytest.approx(0.2, abs=0.05)
    turns, bare = [Seconds(1.0, 0.6), Seconds(3.0, 0.9)], [Seconds(2.0, 0.4), Seconds(2.0, 0.6)]
    row = speed(10, turns, bare)
    assert row["ratio_low"] < row["ratio_to_bare"] < row["ratio_high"]
    assert [row[f"cpu_to_bare{end}"] for end in ("", "_low", "_high")] == pytest.approx([1.5] * 3)


def busy():
    ends = time.process_time() + 0.2
    while time.process_time() < ends:
        pass


class Allocates(Case):
    """Keeps 2 MiB, and needs 3 MiB more in a step, 1 of them for a gradient."""

    def __init__(self):
        self.generator = torch.nn.Linear(512, 512, bias=False)  # 1 MiB
        self.discriminator = torch.nn.Identity()
        self.kept = torch.zeros(2**18)

    def step(self):
        self.generator.weight.grad = None
        temporary = torch.zeros(2**19)
        del temporary
        self.generator.weight.grad = torch.zeros(512, 512)
        temporary = torch.zeros(2**19)
        del temporary


def test_memory_is_what_the_allocator_reserved(capfd):
    memory = measure_memory(Allocates)
    assert memory.state_bytes == 2 * 2**20
    assert memory.peak_bytes == 3 * 2**20
    assert capfd.readouterr() == ("", "")


# Output


def test_result_has_the_documented_fields(tiny, capsys):
    threads = torch.get_num_threads()
    assert main(["bench", "step", "--json", "--size", "tiny", "--rounds", "2"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err.startswith("tiny: ")
    skipped = [case["name"] for case in found["skipped"]]
    assert [row["name"] for row in found["cases"]] == [n for n in CASES if n not in skipped]
    for row in found["cases"]:
        assert row["size"] == "tiny"
        assert row["samples_per_s"] == pytest.approx(TINY.batch / row["step_s"])
        assert row["ratio_low"] <= row["ratio_to_bare"] <= row["ratio_high"]
        assert row["cpu_to_bare_low"] <= row["cpu_to_bare"] <= row["cpu_to_bare_high"]
        assert row["cpu_step_s"] > 0
        assert row["peak_bytes"] > 0
        assert row["state_bytes"] > 0
    bare = found["cases"][0]
    assert bare["name"] == "bare"
    assert bare["ratio_to_bare"] == bare["cpu_to_bare"] == bare["peak_to_bare"] == 1
    assert found["two_processes"] == []
    assert found["environment"]["threads"] == 1
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert torch.get_num_threads() == threads


def test_missing_peers_are_skipped_and_named(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert main(["bench", "step", "--size", "tiny", "--rounds", "1", "--case", "lightning"]) == 0
    shown = capsys.readouterr().out
    assert "lightning" in shown
    assert "gatdist[bench]" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "dcgan64w4"], "--size = 'dcgan64w4'"),
        (["--case", "one_stag"], "--case = 'one_stag'"),
        (["--case", "ddp"], "--case = 'ddp'"),
        (["--rounds", "0"], "--rounds = 0"),
        (["--threads", "-1"], "--threads = -1"),
    ],
)
def test_invalid_options_are_rejected_before_measuring(arguments, message, capsys):
    assert main(["bench", "step", *arguments]) == 2
    assert f"gatdist: {message}: " in capsys.readouterr().err


def row(name, ratio, **more):
    return {
        "name": name,
        "size": "tiny",
        "samples_per_s": 1234.5,
        "ratio_to_bare": ratio,
        "ratio_low": ratio - 0.1,
        "ratio_high": ratio + 0.1,
        "step_s": 0.0123,
        "cpu_step_s": 0.0246,
        "cpu_to_bare": 1.25,
        "cpu_to_bare_low": 1.2,
        "cpu_to_bare_high": 1.3,
        "peak_bytes": 3 * 2**20,
        "peak_to_bare": 1.0,
    } | more


def test_table_is_aligned():
    ratios = ("ratio_to_ddp", "ratio_to_limit", "cpu_to_ddp")
    pair = {f"{ratio}{end}": 0.9 for ratio in ratios for end in ("", "_low", "_high")}
    found = {
        "cases": [row("bare", 1.0), row("one_stage_bfloat16", 12.25, step_s=1.5)],
        "two_processes": [row("canonical", 1.0, ratio_to_fast=0.875, **pair)],
        "skipped": [],
        "environment": {
            "processor": "CPU",
            "cores": 2,
            "threads": 1,
            "load": 0.5,
            "packages": {"torch": "2"},
        },
    }
    one, two, notes = table(found).split("\n\n")
    head, line, first, second = one.splitlines()
    assert {len(text) for text in (head, line, first, second)} == {len(line)}
    assert second.split() == [
        *("one_stage_bfloat16", "1,234", "1500", "ms", "12.250", "12.150", "to", "12.350"),
        *("24.60", "ms", "1.250", "1.200", "to", "1.300", "3.0", "MiB", "1.000"),
    ]
    assert two.startswith("tiny, two processes")
    assert "0.875" in notes


def test_measuring_imports_neither_ray_nor_storage_nor_tensorboard():
    code = "import sys, gatdist.bench.step; print(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    loaded = set(finished.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"ray", "fsspec", "tensorboard", "lightning", "accelerate"}


# Processes


def test_two_processes_are_compared_with_plain_ddp_and_independent_processes(tiny):
    messages = []
    found = measure(
        ["tiny"],
        ["canonical"],
        rounds=1,
        two_processes=True,
        turn_s=0.0,
        report=messages.append,
    )
    names = ["ddp", "alternating", "canonical"]
    assert [row["name"] for row in found["two_processes"]] == names
    assert set(names) <= set(TWO_PROCESSES)
    for row in found["two_processes"]:
        assert row["samples_per_s"] == pytest.approx(2 * TINY.batch / row["step_s"])
        assert row["ratio_to_ddp"] > 0
        assert row["ratio_to_limit"] > 0
        assert row["cpu_to_ddp"] > 0
        assert ("ratio_to_fast" in row) == (row["name"] == "canonical")
    assert found["two_processes"][0]["ratio_to_ddp"] == 1
    assert any("round 1 of 1" in one for one in messages)


def raise_something(comm, report):
    raise ValueError("something")


def die(comm, report):
    os._exit(3)


@pytest.mark.parametrize(
    ("function", "error", "fact"),
    [
        (raise_something, GatdistError, "ValueError: something"),
        (die, WorkerLostError, "process 0"),
    ],
)
def test_failed_process_is_reported_and_none_is_left(function, error, fact):
    with pytest.raises(error) as caught:
        together(1, function, report=lambda text: None)
    assert fact in str(caught.value)


def test_unknown_name_is_a_config_error():
    with refused(ConfigError, "--size"):
        measure(["nothing"])
