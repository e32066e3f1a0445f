"""No training step may ask more of a GPU than ``budgets.json`` says.

Steps run on fake CUDA tensors, in processes of their own. After an improvement, or a change that is
worth its costs: ``python tests/fake_cuda --write [CASE ...]``. ``--where`` shows the lines.
"""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import budgets
import fake_device
import pytest

from gatdist.config import load_config, preset_names
from support import HANG_S, end_group, need

HERE = Path(__file__).resolve().parent
BUDGETS = budgets.load()
# The same code as in another preset, with other sizes.
SLOW = {
    f"preset/{name}"
    for name in (
        *("r3gan-64", "r3gan-cifar10", "r3gan-stacked-mnist"),
        *("r3gan-imagenet-32", "r3gan-imagenet-64"),
        *("sngan-64", "sngan-128", "stylegan2-auto-256"),
    )
} | {f"without-triton/{name}" for name in ("r3gan-256", "stylegan2-256")}
QUICK = [name for name in BUDGETS if name not in SLOW]


@pytest.fixture(scope="module", autouse=True)
def device():
    need("g++")
    try:
        fake_device.library()
    except fake_device.UnavailableError as error:
        pytest.skip(str(error))


def start(*arguments):
    """Start Python with these arguments and without threads."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process):
    try:
        output, errors = process.communicate(timeout=HANG_S)
    finally:
        end_group(process)
    assert process.returncode == 0, errors
    return output


def measured(*names):
    """Measure the cases in two processes."""
    processes = [start(str(HERE), *names[i::2]) for i in range(2) if names[i::2]]
    return {k: v for process in processes for k, v in json.loads(finish(process)).items()}


@pytest.fixture(scope="module")
def quick():
    return measured(*QUICK)


def require_within_budget(name, found):
    exceeded = budgets.exceeded(BUDGETS[name], found)
    hint = f"python tests/fake_cuda {name} --where shows the lines of gatdist"
    assert not exceeded, "\n".join([name, *exceeded, hint])


@pytest.mark.parametrize("name", QUICK)
def test_step_is_within_its_budget(name, quick):
    require_within_budget(name, quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_large_step_is_within_its_budget(name):
    require_within_budget(name, measured(name)[name])


@pytest.mark.parametrize("name", [name for name in BUDGETS if name.startswith("without-triton/")])
def test_kernels_of_triton_save_operators_and_bytes(name):
    with_kernels = BUDGETS[name.replace("without-triton", "preset")]
    for kind, without in BUDGETS[name].items():
        assert with_kernels[kind]["tflop"] == without["tflop"]
        for key in budgets.SCALED:
            assert with_kernels[kind][key] < 0.85 * without[key]


def test_every_preset_has_a_budget():
    assert {f"preset/{name}" for name in preset_names()} <= BUDGETS.keys()


_COPIES_OF_NETWORKS = 5  # weights, gradients, two moments, and the average


@pytest.mark.parametrize(
    "name", ["preset/r3gan-256", pytest.param("preset/stylegan2-256", marks=pytest.mark.slow)]
)
def test_evaluations_and_snapshots_take_no_more_memory_than_a_step(name):
    """Previews are generated in the same way as samples of an evaluation, and are fewer."""
    script = "import fake_device; fake_device.load(); import json, outside\n"
    script += f"print(json.dumps(outside.measure({name!r})))"
    found = json.loads(finish(start("-c", script)))
    state = _COPIES_OF_NETWORKS * found["networks"]
    assert found["snapshot"] == 0
    assert state < state + found["evaluation"] <= BUDGETS[name]["due"]["peak_gib"] * 2**30


def test_documentation_has_the_tables():
    page = budgets.PAGE.read_text(encoding="utf-8")
    assert page == budgets.with_tables(page, BUDGETS)


@pytest.mark.parametrize("key", [*budgets.EXACT, *budgets.SCALED])
def test_a_larger_count_exceeds_the_budget(key):
    budget = {"due": dict.fromkeys([*budgets.EXACT, *budgets.SCALED], 100)}
    allowed = 105 if key in budgets.SCALED else 100
    assert not budgets.exceeded(budget, {"due": budget["due"] | {key: allowed}})
    (line,) = budgets.exceeded(budget, {"due": budget["due"] | {key: allowed + 1}})
    assert key in line


# What a budget may have anything of: ADA looks up pixels by a gather; ``competitive`` decides when
# it has converged.
EXCEPTIONS = {
    f"{kind}/{name}": {"nondeterministic"}
    for kind in ("preset", "without-triton")
    for name in preset_names()
    if getattr(load_config(name).game.augmentation, "name", "") == "ada"
} | {f"rule/competitive-{dtype}": {"host_reads"} for dtype in ("bfloat16", "float32")}


@pytest.mark.parametrize("name", BUDGETS)
def test_presets_have_no_finding(name):
    """Nor can they get one by an update of the budgets."""
    allowed = dict.fromkeys(EXCEPTIONS.get(name, ()), math.inf)
    nothing = dict.fromkeys(budgets.EXACT, 0) | dict.fromkeys(budgets.SCALED, math.inf) | allowed
    assert not budgets.exceeded(dict.fromkeys(BUDGETS[name], nothing), BUDGETS[name])


INJECTED = """
    import fake_device
    fake_device.load()
    import json
    from unittest import mock

    import budgets
    import torch
    from fake_cases import CASES, costs

    from gatdist.bench import step_costs

    functional = torch.nn.functional

    def interpolate(x):
        x = x.detach().requires_grad_()
        functional.interpolate(x, scale_factor=2, mode="bilinear").sum().backward()

    injected = {
        "": lambda x: None,
        "host_reads": lambda x: x.sum().item(),
        "copies": lambda x: x.cpu(),
        "cpu": lambda x: torch.ones(3).add(1),
        "float64": lambda x: x.double(),
        "map_kernels": lambda x: functional.conv2d(x, x.new_empty(1, 3, 32, 32)),
        "nondeterministic": interpolate,
        "operators": lambda x: [x[0, 0, 0] + 1 for _ in range(60)],
        "gib": lambda x: x.new_empty(2**24).clone(),
    }
    name = "rule/one_stage-float32"
    train_step, found = step_costs.train_step, {}
    for key, inject in injected.items():
        def step(state, rule, batch, *arguments):
            train_step(state, rule, batch, *arguments)
            inject(batch.real)

        with mock.patch.object(step_costs, "train_step", step):
            tables = {kind: of.table() for kind, of in costs(CASES[name]()).items()}
        found[key] = budgets.exceeded(budgets.load()[name], tables)
    print(json.dumps(found))
"""


def test_each_kind_of_finding_in_a_step_exceeds_its_budget():
    found = json.loads(finish(start("-c", textwrap.dedent(INJECTED))))
    assert set(found) == {"", *budgets.EXACT, *budgets.SCALED}
    assert found.pop("") == []
    for key, lines in found.items():
        assert [line.split()[2] for line in lines] == [key]


def counted(lines):
    """Run ``lines`` on fake CUDA tensors, and return their costs."""
    script = """
        import fake_device
        fake_device.load()
        import json
        import torch
        from fake_cases import CUDA, fake_cuda
        from gatdist.bench.step_costs import CostMode

        with fake_cuda(), CostMode(CUDA) as mode:
            costs = mode.start()
            def empty(*shape, **options):
                return torch.empty(shape, device="cuda", **options)
        {lines}
        print(json.dumps({**costs.table(), "bytes": costs.bytes, "peak_bytes": costs.peak_bytes,
                          "flops": costs.flops}))
    """
    body = textwrap.indent(textwrap.dedent(lines).strip(), "    ")
    text = textwrap.dedent(script).replace("{lines}", body)
    return json.loads(finish(start("-c", text)))


def test_findings_are_counted():
    found = counted("""
        x = empty(4, 2, 40, 40, requires_grad=True)
        x.sum().item(), bool(x.sum() > 0)
        x.detach().cpu().add(1)
        torch.zeros(3).to("cuda")
        x.detach().double()
        torch.nn.functional.conv2d(x, empty(3, 2, 40, 40))
        torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear").sum().backward()
    """)
    expected = {
        "host_reads": 2,
        "copies": 2,
        "cpu": 2,  # add and zeros
        "float64": 1,
        "map_kernels": 1,
        "nondeterministic": {"upsample_bilinear2d_backward": 1},
    }
    assert expected.items() <= found.items()


def test_costs_of_single_operators():
    found = counted("""
        x, w = empty(2, 4, 10, 10), empty(6, 2, 3, 3)
        y = torch.nn.functional.conv2d(x, w, groups=2)  # [2, 6, 8, 8]
        y.view(-1)[3:].unsqueeze(0)
        del y
    """)
    numbers = 2 * 4 * 10 * 10 + 6 * 2 * 3 * 3, 2 * 6 * 8 * 8
    assert found["flops"] == 2 * numbers[1] * 2 * 3 * 3
    assert found["bytes"] == 4 * sum(numbers)
    assert found["operators"] == found["convolutions"] == 1
    assert found["by_kernel"] == {"3x3 groups=2": 1}
    assert found["peak_bytes"] == 3584 + 512 + 3072  # in blocks of 512


def test_flops_of_backwards_transposed_convolutions_and_products():
    found = counted("""
        x, w = empty(2, 4, 5, 5), empty(4, 3, 2, 2, requires_grad=True)
        torch.nn.functional.conv_transpose2d(x, w, stride=2).sum().backward()
        torch.baddbmm(empty(7, 2, 5), empty(7, 2, 3), empty(7, 3, 5))
    """)
    convolution = 2 * (2 * 4 * 5 * 5) * (3 * 2 * 2)
    assert found["flops"] == 2 * convolution + 2 * 7 * 2 * 3 * 5


def test_autocast_computes_in_its_dtype():
    found = counted("""
        with torch.autocast("cuda", torch.bfloat16):
            y = torch.nn.functional.linear(empty(8, 8), empty(8, 8))
        assert y.dtype == torch.bfloat16
    """)
    assert found["operators"] == 3  # two casts


def test_float64_operators_that_remain():
    """Sums of 64 reported values, and the running mean of gradient norms with ``health.spike``."""
    found = counted("""
        from gatdist.config import HealthConfig
        from gatdist.monitor.statistics import Statistics
        from gatdist.training.health import Guard

        statistics = Statistics(torch.device("cuda"))
        for _ in range(64):
            statistics.add("loss", empty())
        of_statistics = costs.float64
        guard = Guard(HealthConfig(spike="skip"), ("generator",), torch.device("cuda"))
        costs = mode.start()
        guard({"generator": empty()})
        assert (of_statistics, costs.float64) == (9, 6), (of_statistics, costs.float64)
    """)
    assert found["host_reads"] == found["cpu"] == found["copies"] == 0


LOCATED = """
    import fake_device
    fake_device.load()
    import json
    import torch
    from fake_cases import CUDA, fake_cuda
    from gatdist.bench.step_costs import CostMode
    from gatdist.models.layers import uniform

    with fake_cuda(), CostMode(CUDA, locates=True) as mode:
        costs = mode.start()
        uniform(torch.empty(3, dtype=torch.float64, device=CUDA))
        print(json.dumps(list(costs.where)))
"""


def test_lines_of_gatdist_are_located():
    found = json.loads(finish(start("-c", textwrap.dedent(LOCATED))))
    assert found
    assert all(" at models/layers.py:" in place for place in found)
