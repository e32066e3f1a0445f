"""``gatdist simulate``: figures that can't be believed, each told in one line."""

import pytest

from gatdist.cli import main
from gatdist.simulate.study import simulate
from scenarios import HARDWARE, OBSERVED, RUN, SCALING


def changed(text, *pairs):
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


BAD = {
    "an unknown key": (
        changed(OBSERVED, ("seconds_per_1000_samples", "seconds_per_1000_sample")),
        "observed.seconds_per_1000_sample: unknown key. Did you mean 'seconds_per_1000_samples'?",
    ),
    "an unknown section": (
        changed(HARDWARE, ("[hardware]", "[hardwear]")),
        "hardwear: unknown key. Did you mean 'hardware'?",
    ),
    "an unknown key in a list of faults": (
        HARDWARE + RUN.replace("mtbf_hours = 1000.0", "mtbf_hour = 1000.0"),
        "Did you mean 'mtbf_hours'?",
    ),
    "no observations": ("[predict]\nworkers = [4]", "observed: is missing"),
    "nothing to predict": (OBSERVED.partition("[predict]")[0], "predict.workers: is required"),
    "an empty observation": (
        changed(OBSERVED, ("[27.20, 13.74]", "[]")),
        "observed.seconds_per_1000_samples = []",
    ),
    "a missing observation": (
        changed(OBSERVED, ("[27.20, 13.74]", "[27.20]")),
        "must hold one for each of observed.workers (2)",
    ),
    "a count twice": (changed(OBSERVED, ("[1, 2]", "[2, 2]")), "must hold each count once"),
    "no worker": (changed(OBSERVED, ("[4, 8]", "[0, 8]")), "predict.workers.0 = 0"),
    "a negative time": (changed(OBSERVED, ("13.74", "-13.74")), "samples.1 = -13.74"),
    "a time that is none": (changed(OBSERVED, ("13.74", "nan")), "samples.1 = nan"),
    "an efficiency over 1": (
        changed(OBSERVED, ("13.74", "5.1")),
        "2 workers would be 5.33 times as fast as 1, an efficiency of 267%",
    ),
    "one of the times in milliseconds": (
        changed(OBSERVED, ("27.20", "27200.0")),
        "none is above 100 %",
    ),
    "speeds, not times": (
        changed(OBSERVED, ("[27.20, 13.74]", "[36.8, 72.8]")),
        "rise as the workers do, as samples a second would",
    ),
    "a share in percent": (
        changed(HARDWARE, ("utilization = 0.25", "utilization = 25.0")),
        "hardware.utilization = 25.0: must be a share, above 0 and at most 1. 25 % is 0.25",
    ),
    "TFLOP/s": (
        changed(HARDWARE, ("156e12", "156.0")),
        "hardware.flop_per_s = 156.0: must be from 1e+08",
    ),
    "gigabits": (
        changed(HARDWARE, ("= 100e9", "= 100.0")),
        "network.bandwidth_bits_per_s = 100.0: must be from 100000 to 8e+12 bits per second. "
        "25 Gbit/s are 25e9: give bits, not gigabits",
    ),
    "bits for bytes": (
        changed(
            HARDWARE, ("host_bandwidth_bytes_per_s = 240e9", "host_bandwidth_bytes_per_s = 5e12")
        ),
        "network.host_bandwidth_bytes_per_s = 5000000000000.0",
    ),
    "both bits and bytes": (
        HARDWARE + "bandwidth_bytes_per_s = 12.5e9\n",
        "can't stand beside network.bandwidth_bytes_per_s",
    ),
    "microseconds for seconds": (HARDWARE + "latency_s = 15.0\n", "network.latency_s = 15.0"),
    "milliseconds for seconds": (
        changed(HARDWARE, ("batch_per_worker = 8", "batch_per_worker = 8\noverhead_s = 120.0")),
        "workload.overhead_s = 120.0: must be from 0 to 60 seconds. Were milliseconds given?",
    ),
    "no network": (HARDWARE.partition("[network]")[0], "network: is required"),
    "no network between hosts": (
        changed(HARDWARE, ("bandwidth_bits_per_s = 100e9", "")),
        "network.bandwidth_bytes_per_s: is required (or bandwidth_bits_per_s) between hosts",
    ),
    "no hardware": (
        HARDWARE.partition("[hardware]")[0],
        "workload.discriminator.flop_per_sample = 560000000000.0: needs [hardware]",
    ),
    "no batch": (changed(HARDWARE, ("batch_per_worker = 8", "")), "workload.global_batch: is req"),
    "two batches": (
        changed(HARDWARE, ("batch_per_worker = 8", "batch_per_worker = 8\nglobal_batch = 64")),
        "can't stand beside workload.global_batch",
    ),
    "more workers than samples": (
        changed(OBSERVED, ("[predict]", "global_batch = 4\n[predict]")),
        "predict.workers = 8: can't share a batch of 4",
    ),
    "more workers than samples were seen with": (
        changed(OBSERVED, ("[1, 2]", "[1, 64]"), ("[predict]", "global_batch = 32\n[predict]")),
        "observed.global_batch = 32: can't be shared by 64 workers",
    ),
    "a batch of nothing known": (
        OBSERVED + "global_batch = 64\n",
        "predict.global_batch = [64]: needs observed.global_batch",
    ),
    "a source of no kind": (
        OBSERVED + "[sources]\nobserved = 'the paper'",
        "must begin with what it is: measured, observed, published, assumed",
    ),
    "a source of nothing": (
        OBSERVED + "[sources]\n'observed.worker' = 'published: x'",
        "Did you mean 'observed.workers'?",
    ),
    "two lengths of a run": (
        HARDWARE + "[run]\ntotal_samples = 5\nundisturbed_hours = 3.0",
        "one of this and run.undisturbed_hours must be given",
    ),
    "an MTBF in seconds": (
        HARDWARE + RUN.replace("mtbf_hours = 1000.0", "mtbf_hours = 1e9"),
        "must be from 0.001 to 1e+08 hours",
    ),
    "a negative price": (
        HARDWARE + RUN.replace("usd_per_host_hour = 20.0", "usd_per_host_hour = -1.0"),
        "price.usd_per_host_hour = -1.0",
    ),
    "observed and measured": (
        OBSERVED + f"[measured]\nscaling = '{SCALING}/result.json'",
        "can't stand beside [observed]",
    ),
    "no TOML": ("[observed\n", "not valid TOML"),
    "a value for a section": ("predict = 3", "predict = 3: must be a table of keys"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_can_not_be_is_told_in_one_line(scenario, capsys, kind):
    text, told = BAD[kind]
    assert main(["simulate", scenario(text), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert printed.err.startswith("gatdist: ")
    assert printed.err.count("\n") == 1


def test_a_file_that_is_not_there_and_a_name_that_is_none(capsys):
    assert main(["simulate", "nowhere.toml"]) == 2
    assert "nowhere.toml: can't read the file" in capsys.readouterr().err
    assert main(["simulate", "stylegan"]) == 2
    assert "Did you mean 'stylegan3'?" in capsys.readouterr().err


def test_a_bandwidth_that_may_be_in_bits_is_noted(scenario):
    text = changed(HARDWARE, ("bandwidth_bits_per_s = 100e9", "bandwidth_bytes_per_s = 25e9"))
    (note,) = [n for n in simulate(scenario(text))["notes"] if "Gbit/s is meant" in n]
    assert "is 200 Gbit/s; if 25 Gbit/s is meant, say bandwidth_bits_per_s" in note
