"""The kernels of gatdist.nn.fused without a GPU: their numbers in Triton's interpreter, their code.

Each test runs in a process of its own, because Triton decides at its import whether it interprets.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gatdist import nn
from gatdist.nn import fused
from support import HANG_S, end_group

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="not installed: triton")


def output_of(*arguments, **variables):
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", **variables},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=HANG_S)
    finally:
        end_group(process)
    assert process.returncode == 0, output + errors
    return output


@needs_triton
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_compute_what_torch_does(which):
    tests = str(HERE / "interpreted_kernels.py")
    options = "-q", "-m", which, "-p", "no:cacheprovider", "--tb=short", "--no-showlocals"
    found = output_of("-m", "pytest", *options, tests, TRITON_INTERPRET="1")
    assert "passed" in found
    assert "skipped" not in found


def compiled(*arguments, folder):
    script = str(HERE / "compile_kernels.py")
    environment = {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    return json.loads(output_of("-W", "ignore", script, *arguments, **environment))


@needs_triton
@pytest.mark.parametrize(
    "arguments", [("some", "90"), pytest.param(("all", "80", "90"), marks=pytest.mark.slow)]
)
def test_kernels_compile_for_gpus_without_spilling_registers(arguments, tmp_path):
    found = compiled(*arguments, folder=tmp_path)
    names = {name.split()[0] for name in found}
    assert names == {"activate", "activate_gradient", "fir", "philox", "pointwise"}
    assert {name for name, used in found.items() if used["spilled"]} == set()
    assert max(used["shared"] for used in found.values()) <= 48 * 1024


def test_importing_gatdist_does_not_import_triton():
    script = "import sys, gatdist.training.loop, gatdist.nn; assert 'triton' not in sys.modules"
    output_of("-c", script)


@pytest.fixture
def on_cpus(monkeypatch):
    """Let CPUs have kernels, which do not work without the interpreter."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    fused._works.cache_clear()
    with nn.derivatives_of_gpus():
        yield
    fused._works.cache_clear()


@needs_triton
def test_kernels_that_do_not_compile_are_replaced_after_one_warning(on_cpus):
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="Triton does not work on cpu") as caught:
        results = [nn.leaky_relu(x, 0.2) for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(y, torch.nn.functional.leaky_relu(x, 0.2)) for y in results)


@needs_triton
def test_kernels_with_wrong_results_are_not_used(on_cpus, monkeypatch):
    monkeypatch.setattr(fused, "_agree", lambda device: False)
    with pytest.warns(UserWarning, match="results are wrong"):
        assert not nn.fuses(torch.randn(2, 3, 4, 4))


def test_without_triton_nothing_is_fused_and_nothing_is_printed(on_cpus, monkeypatch, recwarn):
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not nn.fuses(torch.randn(2, 3, 4, 4))
    assert not recwarn.list
