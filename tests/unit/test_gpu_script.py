"""The GPU benchmark runs without Ray and storage, and reports errors."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.records import Record

WITHOUT = """
import sys
for name in ("ray", "fsspec", "tensorboard", "sklearn", "PIL"):
    sys.modules[name] = None
from benchmarks import gpu
gpu.CHECKED, gpu.TIMED, gpu.BARE = ("one_stage",), ("alternating_bfloat16",), {"bare": None}
sys.exit(gpu.main())
"""


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Return the results of a small part of the script on the CPU."""
    out = tmp_path_factory.mktemp("gpu")
    options = ["--device", "cpu", "--size", "dcgan16", "--rounds", "1", "--turn-s", "0.01"]
    command = [sys.executable, "-c", WITHOUT, *options, "--no-compile", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / "result.json").read_text()), out


def test_every_precision_is_checked_and_cuda_checks_are_listed(record):
    _, found, _ = record
    findings = {row["name"]: row["ok"] for row in found["correctness"]}
    assert findings.pop("a step from a CUDA graph") is None
    assert findings.pop("a generator from a CUDA graph") is None
    assert len(findings) == 6
    assert all(findings.values())


def test_speed_memory_and_environment_are_reported(record):
    printed, found, out = record
    assert [row["name"] for row in found["throughput"]] == ["bare", "alternating_bfloat16"]
    for row in found["throughput"]:
        assert row["peak_bytes"] > 0
        assert row["ratio_low"] <= row["ratio_to_bare"] <= row["ratio_high"]
    assert {"commit", "processor", "cores", "packages", "gpu"} <= found["environment"].keys()
    assert "one_stage, bfloat16" in printed
    (line,) = Record(out.rename(out.with_name("2026-01-01_gpu")), found).lines()
    assert line.value[0].isdigit()


def test_wrong_step_is_reported(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "precisions", lambda device: [gpu._checked("a step", 1.0, 0.1)])
    monkeypatch.setattr(gpu, "throughput", lambda *arguments: [])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device=cpu", "--no-compile", f"--out={tmp_path}"])
    assert gpu.main() == 1
    assert "WRONG" in capsys.readouterr().out


def test_failing_case_is_a_separate_row():
    rows = []
    with gpu.failing("a graph", rows):
        raise RuntimeError("not while capturing")
    assert rows == [{"name": "a graph", "ok": False, "reason": "RuntimeError: not while capturing"}]
