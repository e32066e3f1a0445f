"""``gatdist simulate``: invalid figures, each reported in one line."""

import pytest

from gatdist.bench.simulate.study import simulate
from gatdist.cli import main
from scenarios import HARDWARE, OBSERVED, RUN, SCALING


def changed(text, *pairs):
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


BAD = {
    "an unknown key": (
        changed(OBSERVED, ("seconds_per_1000_samples", "seconds_per_1000_sample")),
        "observed.seconds_per_1000_sample",
    ),
    "an unknown section": (changed(HARDWARE, ("[hardware]", "[hardwear]")), "hardwear"),
    "an unknown key in a list of faults": (
        HARDWARE + RUN.replace("mtbf_hours = 1000.0", "mtbf_hour = 1000.0"),
        "faults.0.mtbf_hour",
    ),
    "no observations": ("[predict]\nworkers = [4]", "observed"),
    "no workers to predict": (OBSERVED.partition("[predict]")[0], "predict.workers"),
    "an empty observation": (
        changed(OBSERVED, ("[27.20, 13.74]", "[]")),
        "observed.seconds_per_1000_samples = []",
    ),
    "a missing observation": (
        changed(OBSERVED, ("[27.20, 13.74]", "[27.20]")),
        "observed.seconds_per_1000_samples = [27.2]",
    ),
    "a duplicate count": (changed(OBSERVED, ("[1, 2]", "[2, 2]")), "observed.workers = [2, 2]"),
    "no worker": (changed(OBSERVED, ("[4, 8]", "[0, 8]")), "predict.workers.0 = 0"),
    "a negative time": (
        changed(OBSERVED, ("13.74", "-13.74")),
        "observed.seconds_per_1000_samples.1 = -13.74",
    ),
    "an invalid time": (
        changed(OBSERVED, ("13.74", "nan")),
        "observed.seconds_per_1000_samples.1 = nan",
    ),
    "an efficiency over 1": (
        changed(OBSERVED, ("13.74", "5.1")),
        "observed.seconds_per_1000_samples = [27.2, 5.1]",
    ),
    "one time in milliseconds": (
        changed(OBSERVED, ("27.20", "27200.0")),
        "observed.seconds_per_1000_samples = [27200.0, 13.74]",
    ),
    "speeds instead of times": (
        changed(OBSERVED, ("[27.20, 13.74]", "[36.8, 72.8]")),
        "observed.seconds_per_1000_samples = [36.8, 72.8]",
    ),
    "a fraction in percent": (
        changed(HARDWARE, ("utilization = 0.25", "utilization = 25.0")),
        "hardware.utilization = 25.0",
    ),
    "TFLOP/s": (changed(HARDWARE, ("156e12", "156.0")), "hardware.flop_per_s = 156.0"),
    "gigabits": (changed(HARDWARE, ("= 100e9", "= 100.0")), "network.bandwidth_bits_per_s = 100.0"),
    "bits for bytes": (
        changed(
            HARDWARE, ("host_bandwidth_bytes_per_s = 240e9", "host_bandwidth_bytes_per_s = 5e12")
        ),
        "network.host_bandwidth_bytes_per_s = 5000000000000.0",
    ),
    "both bits and bytes": (
        HARDWARE + "bandwidth_bytes_per_s = 12.5e9\n",
        "network.bandwidth_bits_per_s = 100000000000.0",
    ),
    "microseconds for seconds": (HARDWARE + "latency_s = 15.0\n", "network.latency_s = 15.0"),
    "milliseconds for seconds": (
        changed(HARDWARE, ("batch_per_worker = 8", "batch_per_worker = 8\noverhead_s = 120.0")),
        "workload.overhead_s = 120.0",
    ),
    "no network": (HARDWARE.partition("[network]")[0], "network"),
    "no network between hosts": (
        changed(HARDWARE, ("bandwidth_bits_per_s = 100e9", "")),
        "network.bandwidth_bytes_per_s",
    ),
    "no hardware": (
        HARDWARE.partition("[hardware]")[0],
        "workload.discriminator.flop_per_sample = 560000000000.0",
    ),
    "no batch": (changed(HARDWARE, ("batch_per_worker = 8", "")), "workload.global_batch"),
    "two batches": (
        changed(HARDWARE, ("batch_per_worker = 8", "batch_per_worker = 8\nglobal_batch = 64")),
        "workload.batch_per_worker = 8",
    ),
    "more workers than samples": (
        changed(OBSERVED, ("[predict]", "global_batch = 4\n[predict]")),
        "predict.workers = 8",
    ),
    "more workers than samples were seen with": (
        changed(OBSERVED, ("[1, 2]", "[1, 64]"), ("[predict]", "global_batch = 32\n[predict]")),
        "observed.global_batch = 32",
    ),
    "an unknown batch": (OBSERVED + "global_batch = 64\n", "predict.global_batch = [64]"),
    "a source of unknown kind": (
        OBSERVED + "[sources]\nobserved = 'the paper'",
        "sources.observed = 'the paper'",
    ),
    "an empty source": (
        OBSERVED + "[sources]\n'observed.worker' = 'published: x'",
        "sources.observed.worker",
    ),
    "two lengths of a run": (
        HARDWARE + "[run]\ntotal_samples = 5\nundisturbed_hours = 3.0",
        "run.total_samples",
    ),
    "an MTBF in seconds": (
        HARDWARE + RUN.replace("mtbf_hours = 1000.0", "mtbf_hours = 1e9"),
        "faults.0.mtbf_hours = 1000000000.0",
    ),
    "a negative price": (
        HARDWARE + RUN.replace("usd_per_host_hour = 20.0", "usd_per_host_hour = -1.0"),
        "price.usd_per_host_hour = -1.0",
    ),
    "observed and measured": (
        OBSERVED + f"[measured]\nscaling = '{SCALING}/result.json'",
        "measured",
    ),
    "no TOML": ("[observed\n", "FILE"),
    "a value for a section": ("predict = 3", "predict = 3"),
}


@pytest.mark.parametrize("kind", BAD)
def test_invalid_figure_is_reported_in_one_line(scenario, capsys, kind):
    text, field = BAD[kind]
    path = scenario(text)
    assert main(["simulate", path, "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"gatdist: {field.replace('FILE', path)}: ")
    assert printed.err.count("\n") == 1


def test_missing_file_and_unknown_name_are_rejected(capsys):
    assert main(["simulate", "nowhere.toml"]) == 2
    assert "nowhere.toml: " in capsys.readouterr().err
    assert main(["simulate", "stylegan"]) == 2
    error = capsys.readouterr().err
    assert "scenario = 'stylegan': " in error
    assert "'stylegan3'" in error


def test_bandwidth_that_may_be_in_bits_is_noted(scenario):
    text = changed(HARDWARE, ("bandwidth_bits_per_s = 100e9", "bandwidth_bytes_per_s = 25e9"))
    (note,) = [n for n in simulate(scenario(text))["notes"] if "bandwidth_bits_per_s" in n]
    assert "200 Gbit/s" in note
    assert "25 Gbit/s" in note
