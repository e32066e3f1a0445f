"""Steps of two hosts behind a slow link, predicted from one host and the link's rate."""

import pytest

from benchmarks import validation
from benchmarks.slow_links import measured
from gatdist.simulate.measured import fitted_link

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(200)]


def test_a_slow_links_rate_tells_what_a_step_on_two_hosts_takes() -> None:
    (found,) = measured(2, counts=(1, 2), rates=(50.0,))
    one, two = found["scaling"]["points"]
    link = fitted_link({"hosts": [0, 0], "network": found["network"]["2"]})
    assert link.bandwidth_bytes_per_s == pytest.approx(50e6 / 8, rel=0.15)
    network = validation.network_at(link, 50.0)
    assert validation.step_s(two, one, network) == pytest.approx(two["step_s"], rel=0.25)
    # It is the link, and not the computation, that is predicted.
    assert two["step_s"] > 2 * validation.alone_s(two)
