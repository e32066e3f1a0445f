"""Runs that share a cluster request hosts together."""

from gatdist.cluster.demand import Requests

CPU, GPU = ({"CPU": 2.0}, {}), ({"GPU": 1.0}, {"market-type": "spot"})


def test_the_request_is_the_sum_over_runs():
    requests = Requests()
    requests.put("a", [CPU, CPU], 60.0)
    requests.put("b", [GPU], 60.0)
    assert requests.total(1.0) == [CPU, CPU, GPU]
    requests.put("a", [CPU], 61.0)
    assert requests.total(2.0) == [CPU, GPU]
    requests.drop("b")
    requests.drop("b")
    assert requests.total(3.0) == [CPU]


def test_a_request_that_is_not_renewed_expires():
    """Its driver was killed."""
    requests = Requests()
    requests.put("a", [CPU], 60.0)
    requests.put("b", [GPU], 75.0)
    assert requests.total(60.0) == [GPU]
    assert requests.total(75.0) == []
