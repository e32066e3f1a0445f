"""Step time of two hosts on a slow link, predicted from one host and the link's rate.

Accuracy is measured by a benchmark (``benchmarks/cases/simulation.py``): other work on this machine
makes steps longer, and nothing makes a link faster than it is.
"""

import pytest

from benchmarks import validation
from benchmarks.slow_links import measured
from gatdist.bench.simulate.measured import fitted_link

pytestmark = [pytest.mark.hosts, pytest.mark.slow]  # a benchmark measures the same


def test_step_time_on_two_hosts_follows_from_rate_of_slow_link() -> None:
    (found,) = measured(1, counts=(1, 2), rates=(50.0,))
    one, two = found["scaling"]["points"]
    link = fitted_link({"hosts": [0, 0], "network": found["network"]["2"]})
    assert 0.5 < link.bandwidth_bytes_per_s / (50e6 / 8) < 1.15
    simulated_s = validation.step_s(two, one, validation.network_at(link, 50.0))
    assert 0.5 < simulated_s / two["step_s"] < 2
    # The prediction is dominated by the link, not by computation.
    assert simulated_s > 2 * validation.alone_s(two)
