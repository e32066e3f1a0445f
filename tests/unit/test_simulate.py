"""``gatdist simulate``: output, inputs from gatdist's own files, and invalid figures."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import validation
from gatdist.bench.simulate.measured import fitted_link
from gatdist.bench.simulate.scenario import scenario_names
from gatdist.bench.simulate.sections import Recovery
from gatdist.bench.simulate.study import simulate
from gatdist.cli import main
from gatdist.common.errors import ConfigError
from scenarios import HARDWARE, OBSERVED, RESULTS, RUN, SCALING, STEP
from support import refused


def test_points_have_the_documented_fields(scenario, capsys):
    assert main(["simulate", scenario(OBSERVED), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["workers"] for point in found["points"]] == [4, 8]
    four, eight = (point["seconds_per_1000_samples"] for point in found["points"])
    assert 27.2 / 4 < four < 7.6
    assert 27.2 / 8 < eight < 4.4
    for point in found["points"]:
        low, high = (point[f"seconds_per_1000_samples_{end}"] for end in ("low", "high"))
        assert low < point["seconds_per_1000_samples"] < high
        assert point["samples_per_s"] * point["seconds_per_1000_samples"] == pytest.approx(1000)
        assert 0.7 < point["efficiency"] < 1
        assert sum(point["parts"].values()) == pytest.approx(1)
        assert point["bottleneck"] == "computation"
        assert point["runs"] == []
    assert [one["kind"] for one in found["observed"]] == ["observed", "observed"]


def test_points_come_in_the_requested_order(scenario):
    found = simulate(scenario(OBSERVED), ["predict.workers=[8, 1, 4]"])
    assert [point["workers"] for point in found["points"]] == [8, 1, 4]
    assert found["points"][1]["seconds_per_1000_samples"] == pytest.approx(27.2, rel=0.02)


def test_hardware_figures_suffice_and_hosts_have_a_slower_network(scenario):
    one, eight, sixteen = simulate(scenario(HARDWARE))["points"]
    work_s = 8 * 900e9 / (156e12 * 0.25)
    assert one["step_s"] == pytest.approx(work_s)
    assert one["global_batch"], eight["global_batch"] == (8, 64)
    assert (eight["hosts"], sixteen["hosts"]) == (1, 2)
    assert sixteen["parts"]["communication"] > 4 * eight["parts"]["communication"] > 0


def test_run_is_priced_and_advice_respects_deadline_and_budget(scenario):
    found = simulate(scenario(HARDWARE + RUN))
    for point in found["points"]:
        on_demand, spot = point["runs"]
        assert (on_demand["market"], spot["market"]) == ("on demand", "spot")
        assert on_demand["usd"] == pytest.approx(on_demand["hours"] * (20 * point["hosts"] + 1))
        assert spot["usd"] < on_demand["usd"]
        assert spot["hours"] > on_demand["hours"]
        assert spot["faults"] > on_demand["faults"]
        for run in point["runs"]:
            assert sum(run["parts"].values()) == pytest.approx(1)
            assert run["hours_low"] <= run["hours"] <= run["hours_high"]
            undisturbed = 25e3 * point["seconds_per_1000_samples"] / 3600
            assert run["hours"] == pytest.approx(undisturbed / run["goodput"])
            checkpoint = run["checkpoint"]
            assert checkpoint["best_low_s"] <= checkpoint["best_s"] <= checkpoint["best_high_s"]
            assert checkpoint["interval_samples"] == pytest.approx(
                checkpoint["interval_s"] / point["step_s"] * point["global_batch"], abs=1
            )
    advice = found["advice"]
    assert advice["market"] == "spot"
    assert advice["fastest"] == 16
    hours = {p["workers"]: p["runs"][1]["hours"] for p in found["points"]}
    assert advice["fewest_in_time"] == min(w for w, taken in hours.items() if taken <= 60)
    usd = {p["workers"]: p["runs"][1]["usd"] for p in found["points"]}
    assert advice["cheapest"] == min(usd, key=usd.__getitem__)
    assert usd[advice["fastest_within_budget"]] <= 1200


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("network.efficiency=0.001", "communication"),
        ("workload.overhead_s=5.0", "overhead"),
        ("stragglers={deviation=0.9}", "stragglers"),
        ("data={bytes_per_sample=1e6, storage_bytes_per_s=1e7}", "data"),
    ],
)
def test_bottleneck_of_a_step_is_named(scenario, change, named):
    point = simulate(scenario(HARDWARE), [change])["points"][-1]
    assert point["bottleneck"] == point["largest_loss"] == named


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("faults=[{name='crash', of='run', mtbf_hours=0.1, restart_s=900.0}]", "restarts"),
        ("faults=[{name='crash', of='run', mtbf_hours=1.0, restart_s=0.0}]", "lost work"),
        ("faults=[{name='loss', of='run', mtbf_hours=1.0, away_s=20000.0}]", "hosts away"),
    ],
)
def test_bottleneck_of_a_run_is_named(scenario, change, named):
    overrides = ["run={undisturbed_hours=100.0, min_workers=1}", "simulation.repeats=8"]
    overrides += ["network.workers_per_host=1", "predict.workers=[16]", change]
    overrides += ["checkpoints={interval_s=3000.0, snapshot_s=0.1}"] * (named == "lost work")
    (run,) = simulate(scenario(HARDWARE), overrides)["points"][0]["runs"]
    assert run["largest_loss"] == named


def test_each_way_to_recover_has_its_goodput_and_speed(scenario):
    overrides = ["network.workers_per_host=1", "predict.workers=[16]"]
    overrides.append("faults=[{name='host', mtbf_hours=50.0, away_s=600.0}]")
    fixed = simulate(scenario(HARDWARE + RUN), overrides)["points"][0]
    for run in fixed["runs"]:
        assert [(one["size"], one["after_loss"]) for one in run["recoveries"]] == [
            ("fixed", "restart"),
            ("fixed", "continue"),
        ]
    overrides += ["run.min_workers=8", "run.after_loss=continue"]
    (point,) = simulate(scenario(HARDWARE + RUN), overrides)["points"]
    for run in point["runs"]:
        ways = {(one["size"], one["after_loss"]): one for one in run["recoveries"]}
        assert len(ways) == 4
        for one in ways.values():
            assert sum(one["parts"].values()) == pytest.approx(1)
            undisturbed_s = point["seconds_per_1000_samples"]
            assert one["seconds_per_1000_samples"] == pytest.approx(undisturbed_s / one["goodput"])
        best = ways["elastic", "continue"]
        assert run["after_loss"] == "continue"
        assert run["goodput"] == best["goodput"]
        assert best["parts"]["lost work"] == 0
        for size in ("elastic", "fixed"):
            assert ways[size, "continue"]["goodput"] > ways[size, "restart"]["goodput"]
        assert best["goodput"] > ways["fixed", "continue"]["goodput"]


def test_a_lost_worker_takes_its_share_of_a_host(scenario):
    """Seven of eight workers of a host go on."""
    overrides = ["run.after_loss=continue", "run.min_workers=8", "predict.workers=[32]"]
    overrides += ["simulation.repeats=256"]
    away = {}
    for of in ("worker", "host"):
        fault = f"faults=[{{name='one', of='{of}', mtbf_hours=50.0, away_s=1800.0}}]"
        changed = [*overrides, fault]
        (point,) = simulate(scenario(HARDWARE + RUN), changed)["points"]
        away[of] = point["runs"][0]["parts"]["hosts away"]
    # Eight times as often, each an eighth of a host.
    assert away["worker"] == pytest.approx(away["host"], rel=0.25)


def test_faults_of_the_run_are_the_same_either_way(scenario):
    overrides = ["faults=[{name='driver', of='run', mtbf_hours=50.0}]"]
    for point in simulate(scenario(HARDWARE + RUN), overrides)["points"]:
        restart, continues = point["runs"][0]["recoveries"]
        assert restart["goodput"] == continues["goodput"]


def test_goodput_of_recorded_soaks_is_predicted():
    """From times that other benchmarks measured, and the step time between the faults."""
    rows = [one for one in validation.soaks() if "between" in one["what"]]
    assert rows
    for row in rows:
        assert abs(row["error"]) < 0.05, row["what"]


def test_runs_of_one_length_are_compared_by_samples(scenario):
    """The same number of hours on more workers gives more samples."""
    run = RUN.replace("total_samples = 25_000_000", "undisturbed_hours = 100.0")
    found = simulate(scenario(HARDWARE + run))
    shown = [point["runs"][0]["samples"] for point in found["points"]]
    assert shown == sorted(shown)
    assert shown[0] == pytest.approx(100 * 3600 * found["points"][0]["samples_per_s"], rel=1e-6)
    assert found["advice"]["fastest"] == 16
    assert found["advice"]["stops_paying"] is None


def test_every_figure_has_a_source(scenario):
    inputs = {one["key"]: one for one in simulate(scenario(HARDWARE + RUN))["inputs"]}
    assert inputs["hardware.flop_per_s"]["kind"] == "published"
    assert inputs["hardware.flop_per_s"]["source"] == "a data sheet"
    assert inputs["network.latency_s"]["source"] == "as others rent"
    assert inputs["hardware.utilization"]["kind"] == "assumed"
    assert inputs["faults.0.restart_s"] == {
        "key": "faults.0.restart_s", "value": 60.0, "kind": "assumed", "source": "default",
    }  # fmt: skip
    for key, value in Recovery():
        one = inputs[f"recovery.{key}"]
        assert (one["kind"], one["value"]) == ("measured", value)
    (record,) = {one["source"] for key, one in inputs.items() if key.startswith("recovery.")}
    assert (RESULTS.parents[1] / record.removeprefix("default: ") / "result.json").exists()
    seen = {one["key"]: one["kind"] for one in simulate(scenario(OBSERVED))["inputs"]}
    assert seen == {
        "observed.workers": "observed",
        "observed.seconds_per_1000_samples": "observed",
        "observed.deviation": "assumed",
    }


def test_held_out_points_give_the_error(scenario):
    held_out = "[held_out]\nworkers = [4]\nseconds_per_1000_samples = [7.52]\n"
    found = simulate(scenario(OBSERVED + held_out))
    (point,) = found["held_out"]
    simulated = found["points"][0]["seconds_per_1000_samples"]
    assert point["error"] == pytest.approx(simulated / 7.52 - 1)


def test_batch_that_grows_with_the_observed_workers_is_per_worker(scenario):
    text = OBSERVED.replace("[predict]", "global_batch = [16, 32]\n[predict]")
    weak, strong = simulate(scenario(text)), simulate(scenario(OBSERVED))
    assert [point["global_batch"] for point in weak["points"]] == [64, 128]
    assert (
        weak["points"][1]["seconds_per_1000_samples"]
        < strong["points"][1]["seconds_per_1000_samples"]
    )


def test_unknown_batch_is_shared_by_few_workers_and_not_by_many(scenario):
    def efficiency(workers, batch):
        message = [f"predict.workers=[{workers}]"] + [f"workload.batch={batch}"] * bool(batch)
        found = simulate(scenario(OBSERVED), message)
        return found["points"][0]["efficiency"], " ".join(found["notes"])

    for workers, taken in ((8, "shared"), (512, "per_worker")):
        untold, note = efficiency(workers, None)
        assert untold == efficiency(workers, taken)[0]
        assert "batch" in note
    assert efficiency(512, "per_worker")[0] > 0.9 > 0.5 > efficiency(512, "shared")[0]


def test_three_points_determine_the_kind_of_batch(scenario):
    weak = [100, 52, 26.6, 13.5, 6.8]  # a constant loss
    text = OBSERVED.replace("[1, 2]", "[1, 2, 4, 8, 16]").replace("[27.20, 13.74]", str(weak))
    (point,) = simulate(scenario(text), ["predict.workers=[32]"])["points"]
    assert point["seconds_per_1000_samples"] == pytest.approx(3.4, rel=0.03)


# Measurements by gatdist


@pytest.mark.parametrize("workers_per_host", [1, 2])
def test_measured_curve_is_fitted_and_its_bytes_and_phases_are_used(scenario, workers_per_host):
    """Two workers measured on one host competed for its cores; other workers will not."""
    text = f"""
    [measured]
    scaling = "{SCALING}/result.json"
    mode = "weak"
    [network]
    workers_per_host = {workers_per_host}
    bandwidth_bits_per_s = 1e9
    [predict]
    workers = [1, 2, 4]
    """
    found = simulate(scenario(text))
    measured = json.loads((SCALING / "result.json").read_text())
    weak = [point for point in measured["points"] if point["mode"] == "weak"]
    alone = [point["global_batch"] / point["limit_samples_per_s"] for point in weak]
    for seen, point, alone_s in zip(found["observed"], weak, alone, strict=True):
        assert seen["kind"] == "measured"
        step_s = point["step_s"]
        if workers_per_host == 1:
            step_s -= alone_s - alone[0]
        assert seen["seconds_per_1000_samples"] == pytest.approx(
            1000 * step_s / point["global_batch"]
        )
    assert [point["global_batch"] for point in found["points"]] == [32, 64, 128]
    assert "network_slowdown" in found["fit"]
    assert "measured" in {one["kind"] for one in found["inputs"]}


def test_measured_step_is_one_point(scenario):
    text = f"""
    [measured]
    step = "{STEP}/result.json"
    size = "dcgan64_w32"
    [predict]
    workers = [1, 2]
    """
    found = simulate(scenario(text))
    cases = json.loads((STEP / "result.json").read_text())["cases"]
    (case,) = [c for c in cases if (c["name"], c["size"]) == ("alternating", "dcgan64_w32")]
    one, two = found["points"]
    assert one["global_batch"] == 32
    assert one["step_s"] == pytest.approx(case["step_s"], rel=0.02)
    assert two["seconds_per_1000_samples_low"] < two["seconds_per_1000_samples_high"]


def test_all_reduces_of_the_doctor_give_latency_and_bandwidth():
    alpha, beta, p = 80e-6, 117e6, 3
    network = [
        {"bytes": n, "seconds": 2 * (p - 1) * alpha + 2 * (p - 1) / p * n / beta}
        for n in (4_000, 64_000, 1_000_000, 16_000_000)
    ]
    link = fitted_link({"hosts": [{}] * p, "network": network})
    assert link == pytest.approx((alpha, beta))


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ('scaling = "nowhere.json"', "scaling", None),
        (f'scaling = "{STEP}/result.json"', "scaling", f"{STEP}/result.json"),
        (f'step = "{SCALING}/result.json"', "step", f"{SCALING}/result.json"),
        (f'step = "{STEP}/result.json"', "size", None),
        (f'step = "{STEP}/result.json"\nsize = "dcgan64_w23"', "size", "dcgan64_w23"),
        (f'scaling = "{SCALING}/result.json"\nworkers = [1, 3]', "workers", 3),
    ],
)
def test_file_of_another_kind_is_rejected(scenario, text, field, value):
    with refused(ConfigError, f"measured.{field}") as caught:
        simulate(scenario(f"[measured]\n{text}\n[predict]\nworkers = [4]"))
    assert value in (None, caught.value.value)


# Output


@pytest.mark.parametrize("name", scenario_names())
def test_scenarios_of_the_package_have_results_plots_and_sources(name, tmp_path, capsys):
    assert main(["simulate", name, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "result.json").read_text())
    assert f"{found['scenario']}: simulated" in printed
    assert not [i["key"] for i in found["inputs"] if i["source"] == "given without a source"]
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
    drawn = ElementTree.parse(tmp_path / "simulation.svg")
    assert drawn.getroot().tag.endswith("svg")


def test_scenarios_of_the_guide_have_results(tmp_path):
    guide = (RESULTS.parents[1] / "docs/how-to/simulate.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured/result.json").write_bytes((SCALING / "result.json").read_bytes())
    (links,) = RESULTS.glob("*_simulation/links.json")
    network = json.loads(links.read_text())["rates"][0]["network"]["2"]
    report = {"hosts": [{"name": "w1"}, {"name": "w2"}], "network": network}
    (tmp_path / "measured/doctor.json").write_text(json.dumps(report))
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.toml"
        path.write_text(block)
        found = simulate(str(path), ["simulation.repeats=4"])
        assert all(point["samples_per_s"] > 0 for point in found["points"])
    assert found["advice"]["fewest_in_time"]


def test_start_does_not_import_torch_ray_and_matplotlib(scenario):
    script = (
        "import sys; from gatdist.cli import main; main(['simulate', sys.argv[1], '--json']); "
        "print(*sorted({n.partition('.')[0] for n in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, scenario(OBSERVED)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["points"]
    assert not set(done.stderr.split()) & {"torch", "ray", "matplotlib", "tensorboard", "fsspec"}


def test_without_matplotlib_numbers_are_written_with_a_note(
    scenario, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", scenario(OBSERVED), "--out", str(tmp_path / "out")]) == 0
    assert "matplotlib" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]
