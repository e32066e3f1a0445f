"""Scenarios that several tests modify, and recorded measurements to fit them to."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
SCALING, STEP = RESULTS / "2026-11-24_scaling", RESULTS / "2026-11-23_step"

OBSERVED = """
[observed]
workers = [1, 2]
seconds_per_1000_samples = [27.20, 13.74]
[predict]
workers = [4, 8]
"""
HARDWARE = """
[predict]
workers = [1, 8, 16]
[workload]
batch_per_worker = 8
[workload.discriminator]
flop_per_sample = 560e9
parameters = 29e6
[workload.generator]
flop_per_sample = 340e9
parameters = 25e6
[hardware]
flop_per_s = 156e12
utilization = 0.25
[network]
workers_per_host = 8
host_bandwidth_bytes_per_s = 240e9
bandwidth_bits_per_s = 100e9
"""
RUN = """
[run]
total_samples = 25_000_000
[price]
usd_per_host_hour = 20.0
head_usd_per_hour = 1.0
[spot]
usd_per_host_hour = 8.0
mtbf_hours = 50.0
[[faults]]
name = "host dies"
mtbf_hours = 1000.0
away_s = 600.0
[goal]
deadline_hours = 60.0
budget_usd = 1200.0
[sources]
"hardware.flop_per_s" = "published: a data sheet"
"network" = "assumed: as others rent"
"""
