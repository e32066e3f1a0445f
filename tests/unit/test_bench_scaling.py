"""``gatdist bench scaling`` without Ray: an argument starts the groups."""

import io
import json
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from gatdist.bench.cases import RULES, SIZES, Size, gatdist_case
from gatdist.bench.processes import together
from gatdist.bench.scaling.measure import measure, plan
from gatdist.bench.scaling.report import draw, table
from gatdist.bench.scaling.worker import reduced_bytes, ring_bytes, sent_by_interface
from gatdist.cli import main
from gatdist.cli.bench import publish
from gatdist.common.errors import ConfigError
from gatdist.storage import Store
from support import refused, spawn

TINY = Size("tiny", "dcgan", {"width": 2}, (1, 16, 16), 4)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)


def processes(world_size, function, *args):
    """Return a launcher of processes on this machine."""
    return together(world_size, function, "", *args, report=lambda text: None), 0.5


def gradient_bytes(case):
    players = case.generator, case.discriminator
    return sum(4 * p.numel() for network in players for p in network.parameters())


# Measurements


def test_points_have_the_documented_fields(tiny):
    made = plan([2, 1], sizes=["tiny"], rounds=2, turn_s=0.0)
    found = measure(made, processes)
    assert [(p["mode"], p["workers"], p["global_batch"]) for p in found["points"]] == [
        ("strong", 1, 4),
        ("strong", 2, 4),
        ("weak", 1, 4),
        ("weak", 2, 8),
    ]
    sent = gradient_bytes(gatdist_case(TINY, RULES["alternating"]))  # 2 (p − 1) / p is 1
    for point in found["points"]:
        assert point["samples_per_s"] == pytest.approx(point["global_batch"] / point["step_s"])
        ratio = point["samples_per_s"] / point["limit_samples_per_s"]
        assert point["efficiency"] == pytest.approx(ratio)
        assert point["efficiency_low"] <= point["efficiency"] <= point["efficiency_high"]
        assert point["phases"].keys() == {"discriminator", "generator", "optimizer"}
        assert min(point["phases"].values()) > 0
        assert (point["communication_s"] > 0) == (point["workers"] == 2)
        assert point["bytes_sent"] == (sent if point["workers"] == 2 else 0)
        assert point["bytes_measured"] is None
        assert point["hosts"] == {socket.gethostname(): point["workers"]}
        assert (point["size"], point["rule"], point["start_s"]) == ("tiny", "alternating", 0.5)
    assert [p["speedup"] for p in found["points"] if p["workers"] == 1] == [1, 1]
    (host,) = found["hosts"]
    assert host["packages"]["torch"] == torch.__version__
    assert host["memory_bytes"] > 2**28
    json.dumps(found)


class FakeLauncher:
    """A launcher whose groups return given results."""

    def __init__(self, hosts, **measured):
        self.hosts, self.measured = hosts, measured

    def __call__(self, world_size, function, works):
        answers = []
        for rank, host in enumerate(self.hosts[:world_size]):
            one = {
                "steps": 10,
                "seconds": {"together": [4.0, 2.0, 2.0], "alone": [1.0, 1.0, 2.0]},
                "phases": {"generator": 0.01 * (rank + 1)},
                "communication_s": 0.002,
                "reduced_bytes": 1000,
                "sent_bytes": 1200.0 + rank,
            } | {key: values[rank] for key, values in self.measured.items()}
            machine = {"host": host, "gpu": None, "processor": "CPU", "cores": 2, "threads": 1}
            machine |= {"memory_bytes": 2**30, "packages": {"torch": "2", "ray": "2"}}
            answers.append({"host": machine, "measured": [one] * len(works)})
        return answers, 1.5


def point(hosts, **measured):
    made = plan([len(hosts)], modes=["weak"], rounds=3)
    (found,) = measure(made, FakeLauncher(hosts, **measured))["points"]
    return found


def test_speeds_are_medians_and_extremes_are_of_single_rounds():
    found = point(["a", "b"])
    assert found["step_s"] == 0.2
    assert found["samples_per_s"] == pytest.approx(64 / 0.2)
    assert found["limit_samples_per_s"] == pytest.approx(64 / 0.1)
    ratios = found["efficiency"], found["efficiency_low"], found["efficiency_high"]
    assert ratios == pytest.approx((0.5, 0.25, 1.0))
    assert found["phases"] == pytest.approx({"generator": 0.015})


def test_upper_bound_is_the_sum_of_all_workers_speeds():
    # One takes 1 s for a turn, the other 3 s: in one second, 1 + 1/3 turns.
    seconds = [{"together": [2.0] * 3, "alone": [one] * 3} for one in (1.0, 3.0)]
    found = point(["a", "b"], seconds=seconds)
    assert found["limit_samples_per_s"] == pytest.approx((1 + 1 / 3) * 10 * 32)


@pytest.mark.parametrize(
    ("hosts", "sent", "measured"),
    [
        ("ab", [1200.0, 1300.0], 1250),
        ("aabb", [1200.0, 1200.0, 1300.0, 1300.0], 625),  # two workers share an interface
        ("aa", [1200.0, 1200.0], None),
        ("ab", [1200.0, None], None),
    ],
)
def test_measured_bytes_are_reported_if_hosts_differ(hosts, sent, measured):
    assert point(list(hosts), sent_bytes=sent)["bytes_measured"] == measured


def test_ring_sends_twice_the_share_of_the_other_workers():
    assert [ring_bytes(1200, workers) for workers in (1, 2, 3, 4)] == [0, 1200, 1600, 1800]


# Bytes sent


def test_reduced_bytes_depend_on_rule_and_dtype():
    case = gatdist_case(TINY, RULES["alternating"])
    once = gradient_bytes(case)
    assert reduced_bytes(case) == once
    assert reduced_bytes(case) == once  # counting does not change the case
    assert reduced_bytes(gatdist_case(TINY, RULES["one_stage"])) == once
    assert reduced_bytes(gatdist_case(TINY, RULES["extragradient"])) == 2 * once
    assert reduced_bytes(gatdist_case(TINY, RULES["canonical"])) == once
    half = RULES["alternating"] | {"precision": {"reduce_dtype": "bfloat16"}}
    assert reduced_bytes(gatdist_case(TINY, half)) == once / 2


def _loopback_bytes(comm, num_bytes):
    before = sent_by_interface("lo")
    comm.all_reduce_(torch.ones(num_bytes // 4))
    comm.any(False)
    return sent_by_interface("lo") - before


def test_interface_counts_what_a_group_sends():
    """Both workers send a ring's share through the same interface."""
    num_bytes = 16 * 2**20
    assert max(spawn(2, _loopback_bytes, num_bytes)) >= 2 * ring_bytes(num_bytes, 2)


def test_without_interface_no_bytes_are_counted():
    assert sent_by_interface("") is None
    assert sent_by_interface("none-such") is None


# Invalid options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers = '0'"),
        (["--workers", "1,-2"], "--workers = '1,-2'"),
        (["--workers", "1,two"], "--workers = '1,two'"),
        (["--workers", "1,"], "--workers = '1,'"),
        (["--workers", "100000"], "--workers = 100000"),
        (["--workers", "1", "--size", "dcgan64w4"], "--size = 'dcgan64w4'"),
        (["--workers", "1", "--rule", "one_stag"], "--rule = 'one_stag'"),
        (["--workers", "1", "--mode", "week"], "--mode = 'week'"),
        (["--workers", "1", "--mode", ""], "--mode = ''"),
        (["--workers", "1", "--rounds", "0"], "--rounds = 0"),
        (["--workers", "1", "--batch", "0"], "--batch = 0"),
        (["--workers", "1", "--quality", "digit"], "preset = 'digit'"),
        (["--workers", "1", "--out", "/proc/none"], "--out = '/proc/none'"),
        (["--workers", "2", "--address", "127.0.0.1:1", "--batch", "3"], "--workers = 2"),
        (["--workers", "1", "--address", "127.0.0.1:1"], "cluster.address = '127.0.0.1:1'"),
    ],
)
def test_invalid_options_are_rejected_before_anything_starts(arguments, message, capsys):
    assert main(["bench", "scaling", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gatdist: {message}: ")


def test_strong_scaling_suggests_valid_counts_and_batches(capsys):
    arguments = ["--workers", "3", "--address", "127.0.0.1:1"]
    assert main(["bench", "scaling", *arguments]) == 2
    error = capsys.readouterr().err
    for fact in ("--workers = 3: ", "2 or 4", "--batch 33", "--mode weak"):
        assert fact in error


def test_rule_that_excludes_a_worker_count_is_reported():
    with refused(ConfigError, "cluster.workers"):
        plan([4], rule="canonical")


# Output


def result(**more):
    found = measure(plan([1, 2, 4], rounds=3), FakeLauncher(["a", "b", "c", "d"]))
    return found | {"recovery": None, "skipped": [], "rounds": 3} | more


def test_table_is_aligned_and_complete():
    quality = {"fid": 1.25, "samples_seen": 640}
    found = result(
        recovery={"workers": 4, "recovery_s": 6.8, "elastic_s": 0.4, "steps_repeated": 1},
        skipped=[{"what": "quality", "reason": "--run-dir: is needed on several hosts"}],
    )
    for one in found["points"]:
        one["quality"] = quality
    strong, _, weak, _, notes = table(found).split("\n\n")
    title, head, line, *rows = strong.splitlines()
    assert title.startswith("dcgan64_w32, alternating, strong: ")
    assert weak.startswith("dcgan64_w32, alternating, weak: ")
    assert {len(text) for text in (head, line, *rows)} == {len(line)}
    assert head.split()[-1] == "fid"
    assert rows[1].split() == [
        *("2", "160", "320", "50.0%", "25.0%", "to", "100.0%", "1.00", "×", "200", "ms"),
        *("1.0", "kB", "1.2", "kB", "1.5", "s", "1.25"),
    ]
    for fact in ("4 workers", "6.8 s", "0.4 s", "quality: --run-dir: ", "d: CPU, 2 cores, 1.1 GB"):
        assert fact in notes


@pytest.mark.parametrize("counts", [[1], [1, 2], [1, 2, 4, 8, 16]])
def test_plot_is_an_image_in_both_formats(counts):
    pytest.importorskip("matplotlib")
    found = measure(plan(counts, rounds=3), FakeLauncher(list("abcdefghijklmnop")))
    files = draw(found)
    assert files.keys() == {"scaling.svg", "scaling.png"}
    assert ElementTree.fromstring(files["scaling.svg"]).tag == "{http://www.w3.org/2000/svg}svg"
    with Image.open(io.BytesIO(files["scaling.png"])) as image:
        assert image.width > image.height > 500
        assert len(image.convert("RGB").getcolors(10**6)) > 10  # the plot is not empty
    assert draw(found) == files  # the same numbers give the same bytes


def test_results_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    found = result()
    publish(found, draw, Store(str(tmp_path)))
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert {p.name for p in tmp_path.iterdir()} == {"result.json", "scaling.svg", "scaling.png"}


def test_without_matplotlib_numbers_are_written_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    publish(result(), draw, Store(str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert "matplotlib" in capsys.readouterr().err


def test_measuring_does_not_import_ray():
    code = "import sys, gatdist.bench.scaling.measure; print(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    loaded = set(finished.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"ray", "tensorboard", "matplotlib"}
