"""The GPU benchmark: isolated, resumable parts, which run without Ray and storage."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import correctness, kernels, speed, tables
from benchmarks.gpu.__main__ import report
from benchmarks.gpu.parts import PROFILED, chosen, implementations, parts
from benchmarks.gpu.runner import AGAIN, Part, ResultFile, run_parts
from benchmarks.records import Record
from gatdist.bench.presets import PRESETS
from gatdist.nn import derivatives_of_gpus
from support import HANG_S
from tensor_cores import TensorCores

CPU = torch.device("cpu")
FACTS = {"device": "NVIDIA H200", "source": "1"}
# Commands by the names of parts; each writes its result to {out}.
COMMANDS = {
    "good": "echo '{{\"rows\": []}}' > {out}",
    "error": "echo 'RuntimeError: CUDA error: an illegal access' >&2; echo a hint >&2; exit 1",
    "killed": "kill -9 $$",
    "silent": "exit 0",
    "hangs": "sleep 60",
}


def command(part, out):
    return ["sh", "-c", COMMANDS[part.name].format(out=out)]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("error", "failed", "RuntimeError: CUDA error: an illegal access"),
        ("killed", "failed", "SIGKILL"),
        ("silent", "failed", "no output"),
        ("hangs", "timeout", "1 s"),
    ],
)
def test_a_part_that_fails_costs_itself_only(name, status, message, tmp_path):
    results = ResultFile(tmp_path / "result.json", FACTS)
    some = [Part(name, limit_s=1), Part("good")]
    assert run_parts(some, results, command, {}) == 0
    known = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert known[name]["status"] == status
    assert message in known[name]["message"]
    assert known["good"]["status"] == "done"
    assert report(results, tmp_path, 0) == 0  # neither is a part of the benchmark
    assert tables.is_wrong(known[name])


def test_parts_with_a_result_are_skipped_until_code_or_device_change(tmp_path):
    ran = []

    def counted(part, out):
        ran.append(part.name)
        return command(part, out)

    for facts, expected in ((FACTS, 2), (FACTS, 0), (FACTS | {"source": "2"}, 2)):
        results = ResultFile(tmp_path / "result.json", facts)
        run_parts([Part("good"), Part("error")], results, counted, {})
        assert len(ran) == expected
        ran.clear()


def test_no_part_starts_without_time_for_it(tmp_path):
    results = ResultFile(tmp_path / "result.json", FACTS)
    some = [Part("good", usual_s=100), Part("error", usual_s=100)]
    assert run_parts(some, results, command, {}, limit_s=60) == 1  # at least one in each call
    assert run_parts(some, results, command, {}, limit_s=60) == 0
    assert results.parts.keys() == {"good", "error"}


def test_a_part_cut_short_by_the_limit_is_run_again(tmp_path):
    results = ResultFile(tmp_path / "result.json", FACTS)
    some = [Part("good"), Part("hangs", usual_s=0, limit_s=60)]
    assert run_parts(some, results, command, {}, limit_s=1.5) == 1
    assert results.parts.keys() == {"good"}


def test_a_part_ends_with_the_run(tmp_path):
    script = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu.runner import Part, run_part
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
run_part(Part("x"), lambda part, out: ["sh", "-c", "echo $$ > {tmp_path}/pid; sleep 60"], 60)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        until = time.monotonic() + HANG_S
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait(HANG_S)
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_exit_status(tmp_path, capsys):
    results = ResultFile(tmp_path / "result.json", FACTS)
    rows = [correctness.checked("a step", 0.05, 0.1)]
    results.parts["correctness/graphs"] = {"status": "done", "rows": rows}
    assert report(results, tmp_path, 0) == 0
    assert report(results, tmp_path, 3) == AGAIN
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("again")
    rows.append(correctness.checked("another step", 0.2, 0.1))
    assert report(results, tmp_path, 0) == 1
    assert "WRONG" in capsys.readouterr().out
    assert "| WRONG | another step" in (tmp_path / "result.md").read_text()


def test_parts_cover_every_preset_and_their_settings_are_valid():
    names = [part.name for part in parts()]
    assert len(names) == len(set(names))
    assert {f"speed/{name}/gatdist" for name in PRESETS} <= {*names}
    assert {f"speed/{name}/hand_written" for name in PRESETS} <= {*names}
    assert {f"kernels/{name}" for name in PROFILED} <= {*names}
    assert all(part.usual_s <= part.limit_s < 540 for part in parts())
    for preset in PRESETS:
        for name in implementations(preset):
            PRESETS[preset].config(speed.IMPLEMENTATIONS[name][1])
    assert [p.name for p in chosen(["*/ring/gatdist", "kernels/r3gan-2*"])] == [
        "kernels/r3gan-256",
        "speed/ring/gatdist",
    ]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_computed_costs(preset):
    (found,) = speed.budget(preset, {"": {}}).values()
    assert found["operators"] > 0
    assert found["peak_gib"] > 0
    assert found["roofline_ms"]["H200 SXM"] > 0


def measured(preset, *names):
    """Return results of small steps, as they are in the result file."""
    found = {f"speed/{preset}/{n}": speed.measure(preset, n, CPU, "small", 0.01) for n in names}
    return {name: {"status": "done", "seconds": 1.0, **one} for name, one in found.items()}


def test_steps_are_measured_by_the_penalties_that_are_due(tmp_path):
    results = measured("stylegan2-256", "gatdist", "hand_written")
    for row in tables.compared(results):
        steps = row["steps"]
        assert {due: step["share"] for due, step in steps.items()} == {
            "": 3 / 4,
            "path_length": 3 / 16,
            "r1, path_length": 1 / 16,
        }
        assert steps["r1, path_length"]["step_s"] > steps[""]["step_s"] > 0
        assert all(step["low"] <= step["step_s"] <= step["high"] for step in steps.values())
        assert row["step_s"] == pytest.approx(sum(s["share"] * s["step_s"] for s in steps.values()))
        assert row["samples_per_s"] == pytest.approx(8 / row["step_s"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["peak_bytes"] > 0
    text = tables.as_markdown(results, "CPU")
    assert "hand_written" in text
    (line,) = Record(tmp_path / "2026-01-01_gpu", {"parts": results}).lines()
    assert "hand-written" in line.value


def test_graphs_need_cuda():
    results = measured("ring", "gatdist_graphs")
    assert tables.compared(results) == []
    assert "needs CUDA" in tables.as_markdown(results, "CPU")


def test_deviations_from_budgets_are_flagged():
    steps = {
        due: {"share": 0.5, "step_s": 1.0, "kernels": 1000, "busy_s": 0.9}
        for due in ("", "path_length", "r1, path_length")
    }
    row = {"steps": steps, "budget": speed.budget("stylegan2-256", steps), "peak_bytes": 2**30}
    known = row["budget"]
    assert known.keys() == {"", "r1, path_length"}
    plain, due = tables.budgets(row, "NVIDIA H200")
    assert plain["flags"] == due["flags"] == []
    assert due["kernels"] == 1000 / known["r1, path_length"]["operators"]
    assert due["roofline"] == known["r1, path_length"]["roofline_ms"]["H200 SXM"] / 1e3

    steps[""] |= {"kernels": 1.4 * known[""]["operators"], "busy_s": 0.5}
    row["peak_bytes"] = 2**40
    plain, due = tables.budgets(row, "NVIDIA H200")
    assert len(plain["flags"]) == 3
    assert due["flags"] == []


@pytest.mark.parametrize(
    ("gpu", "model"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_models_of_gpus_are_recognized(gpu, model):
    from gatdist.bench.roofline import GPUS

    assert [each.name for each in GPUS if tables._is(each.name, gpu)] == [model]


@pytest.mark.parametrize("check", ["convolutions", "networks"])
def test_tolerances_distinguish_tf32_from_float32(check):
    """With TF32 emulated where torch's switches allow it."""
    with TensorCores(), derivatives_of_gpus():
        rows = correctness.run(check, CPU)["rows"]
    assert all(row["ok"] for row in rows), rows
    errors = {row["name"]: row["error"] for row in rows}
    for name, error in errors.items():
        if "TF32" in name:
            exact = name.replace(", TF32", "")
            (tolerance,) = (row["tolerance"] for row in rows if row["name"] == exact)
            assert errors[exact] < tolerance < error, name


def test_repeated_and_continued_runs_are_identical():
    rows = correctness.run("repeated", CPU)["rows"]
    assert [row["ok"] for row in rows] == [True] * 4 + [None]


def test_kernels_of_triton_are_compared_where_they_run():
    rows = correctness.run("kernels", CPU)["rows"]
    assert len(rows) == 12
    assert {row["reason"] for row in rows} == {"no kernels of Triton here"}


def test_a_difference_is_found():
    ones = torch.ones(4)
    assert not correctness.identical("runs", ones, ones + torch.tensor([0, 0, 0, 1e-7]))["ok"]
    assert not correctness.checked("a step", float("nan"), 0.1)["ok"]


def test_longest_operators_come_first():
    a = torch.randn(200, 200)
    rows = kernels.top(lambda: (a @ a, a + 1), CPU, steps=2)
    assert rows[0]["name"] == "aten::mm"
    assert rows[0]["count"] == 1
    assert sum(row["share"] for row in rows) == pytest.approx(1)


ABSENT = ("ray", "fsspec", "tensorboard", "sklearn", "PIL", "rich", "scipy", "isal", "simplejpeg")


def test_it_runs_without_ray_and_storage_and_continues(tmp_path):
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    start = [sys.executable, "-m", "benchmarks", "gpu", "--device=cpu", "--size=small"]
    out = tmp_path / "out"

    def run(*names):
        done = subprocess.run(
            [*start, f"--out={out}", *(f"--only={name}" for name in names)],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((out / "result.json").read_text())

    names = ["speed/ring/gatdist", "kernels/r3gan-64"]
    before = run(*names[:1])["parts"]
    found = run(*names)
    assert found["parts"].keys() == {*names}
    assert before.items() <= found["parts"].items()
    assert {part["status"] for part in found["parts"].values()} == {"done"}
    assert found["parts"]["speed/ring/gatdist"]["samples_per_s"] > 0
    assert {"commit", "processor", "cores", "packages", "gpu"} <= found["environment"].keys()
