"""The kernels of gatdist.nn.fused without a GPU: their numbers in Triton's interpreter, their code.

Each test runs in a process of its own, because Triton decides at its import whether it interprets.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier
from time import sleep
from types import ModuleType

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


class Launches:
    """Stands for the module of kernels: keeps grids, and launches nothing."""

    def __init__(self):
        self.grids = {}

    def __getattr__(self, name):
        return Launcher(name, self.grids)


class Launcher:
    def __init__(self, name, grids):
        self.name, self.grids = name, grids

    def __getitem__(self, grid):
        self.grids[self.name] = grid
        return lambda *args, **constants: None


def test_grids_stay_within_the_limits_of_cuda(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(fused, "_kernels", lambda: launches)
    samples = torch.empty(70_000, 1, 1, 1)
    _, signs = fused.activate(samples, None, None, None, None, 0.2, 1.0, True)
    fused.activate_gradient(samples, signs, None, None, None, 0.2, 1.0, True)
    fused.fir(samples, 2, 1, 2, 1, 4.0)
    x = fused._empty(torch.empty(0, dtype=torch.float16), (32, 16, 512, 513), True)
    fused.pointwise(x, x[0, :, 0, :16, None, None], None, None, None, 0.2, 1.0, False, False)
    assert launches.grids.keys() == {"activate", "activate_gradient", "fir", "pointwise"}
    for grid in launches.grids.values():
        assert max(grid[1:], default=1) <= 65_535


def test_products_need_matrix_units(monkeypatch):
    """Without them Triton multiplies by scalar operations, and spills kilobytes of registers."""
    for capability, dtypes in (((7, 5), set()), ((8, 0), {torch.float16, torch.bfloat16})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert set(fused._product_dtypes(torch.device("cuda"))) == dtypes


def test_kernels_are_not_checked_while_a_graph_is_recorded(on_cpus, monkeypatch):
    """The check reads results, which ends a recording."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(fused, "_is_correct", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not fused._works(device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fused._works(device)


def test_threads_check_kernels_once(on_cpus, monkeypatch):
    checks, together = [], Barrier(2)

    def check(device):
        checks.append(device)
        sleep(0.1)  # the other thread's chance to check as well
        return True

    def use():
        together.wait()
        return fused._works(torch.device("cpu"))

    monkeypatch.setattr(fused, "_is_correct", check)
    with ThreadPoolExecutor(2) as pool:
        assert all(f.result() for f in [pool.submit(use), pool.submit(use)])
    assert len(checks) == 1


def test_importing_gatdist_does_not_import_triton():
    script = "import sys, gatdist.training.loop, gatdist.nn; assert 'triton' not in sys.modules"
    output_of("-c", script)


@pytest.fixture
def on_cpus(monkeypatch):
    """Let CPUs have kernels, which do not work without the interpreter."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    fused._found.clear()
    with nn.derivatives_of_gpus():
        yield
    fused._found.clear()


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


def test_a_module_that_stands_for_triton_is_not_used(on_cpus, monkeypatch):
    """Some packages put one there, without the description that Python looks for."""
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    with pytest.warns(UserWarning, match="Triton does not work on cpu"):
        assert not nn.fuses(torch.randn(2, 3, 4, 4))


def test_without_triton_nothing_is_fused_and_nothing_is_printed(on_cpus, monkeypatch, recwarn):
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not nn.fuses(torch.randn(2, 3, 4, 4))
    assert not recwarn.list
