"""The proxy that makes servers slow and faulty, for tests and ``gatdist bench storage``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest

from benchmarks.proxy import Fault, Proxy, proxy_process

pytestmark = pytest.mark.storage

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def upstream(nginx: tuple[str, Path]) -> tuple[str, str]:
    """Return an address, and the path of a folder there with the files ``x`` and ``y``."""
    address, root = nginx
    folder = str(uuid4())
    (root / folder).mkdir()
    for name in ("x", "y"):
        (root / folder / name).write_bytes(CONTENT)
    return address, f"/{folder}"


@pytest.fixture
def proxy(upstream: tuple[str, str]) -> Iterator[Proxy]:
    with Proxy(upstream[0]) as proxy:
        yield proxy


def get(url: str, first: int | None = None, last: int = 0) -> bytes:
    headers = {} if first is None else {"Range": f"bytes={first}-{last}"}
    answer: HTTPResponse
    with urlopen(Request(url, headers=headers), timeout=300) as answer:
        return answer.read()


def test_passed_requests_are_unchanged_and_counted(proxy: Proxy, upstream: tuple[str, str]) -> None:
    url = f"{proxy.url}{upstream[1]}/x"
    assert get(url) == CONTENT
    assert get(url, 10, 19) == CONTENT[10:20]
    assert get(f"{proxy.url}{upstream[1]}/").count(b"<a href") == 3  # chunked
    with urlopen(Request(url, method="HEAD"), timeout=300) as answer:
        assert answer.headers["Content-Length"] == str(len(CONTENT))
    with pytest.raises(HTTPError, match="404"):
        get(f"{proxy.url}/no")
    seen = [(e.method, e.path.rsplit("/", 1)[-1], e.range, e.status) for e in proxy.exchanges]
    assert seen == [
        ("GET", "x", "", 200),
        ("GET", "x", "bytes=10-19", 206),
        ("GET", "", "", 200),
        ("HEAD", "x", "", 200),
        ("GET", "no", "", 404),
    ]
    assert [e.num_bytes for e in proxy.exchanges[:2]] == [len(CONTENT), 10]
    assert proxy.num_bytes == sum(e.num_bytes for e in proxy.exchanges)


def test_faults_are_selected_by_name_and_number(proxy: Proxy, upstream: tuple[str, str]) -> None:
    x, y = (f"{proxy.url}{upstream[1]}/{name}" for name in "xy")
    proxy.faults = [
        Fault("refuse", path="*/x", requests=(1, 3), status=429, headers={"Retry-After": "7"}),
        Fault("refuse", path="*/y", holding="bytes=5-", status=500, body="because"),
    ]
    assert get(x) == CONTENT
    for _ in range(2):
        with pytest.raises(HTTPError, match="429") as error:
            get(x)
        assert error.value.headers["Retry-After"] == "7"
    assert get(x) == CONTENT
    assert get(y) == CONTENT
    with pytest.raises(HTTPError, match="500") as error:
        get(y, 5, 9)
    assert error.value.read() == b"because"
    assert get(y, 5, 9) == CONTENT[5:10]
    assert [e.fault for e in proxy.exchanges] == ["", "refuse", "refuse", "", "", "refuse", ""]


def test_bodies_are_damaged(proxy: Proxy, upstream: tuple[str, str]) -> None:
    url = f"{proxy.url}{upstream[1]}/x"
    proxy.faults = [Fault("flip_bit")]
    damaged = get(url)
    (place,) = [i for i, (a, b) in enumerate(zip(damaged, CONTENT, strict=True)) if a != b]
    assert (damaged[place] ^ CONTENT[place]).bit_count() == 1
    proxy.faults = [Fault("short")]
    assert get(url, 0, 99) == CONTENT[:50]
    proxy.faults = [Fault("ignore_range")]
    assert get(url, 0, 99) == CONTENT
    proxy.faults = [Fault("reset")]
    with pytest.raises((ConnectionResetError, IncompleteRead)):
        get(url)
    for kind in ("silence", "stall"):
        proxy.faults = [Fault(kind)]  # type: ignore[arg-type]
        with pytest.raises(TimeoutError), urlopen(url, timeout=0.3) as answer:
            answer.read()
    assert get(url) == CONTENT


def test_requests_arrive_late_or_their_answers_are_lost(
    proxy: Proxy, upstream: tuple[str, str]
) -> None:
    url = f"{proxy.url}{upstream[1]}/x"
    proxy.faults = [Fault("late")]
    for each in (url, f"{proxy.url}{upstream[1]}/y"):
        with pytest.raises(TimeoutError), urlopen(each, timeout=0.3) as answer:
            answer.read()
    assert [exchange.fault for exchange in proxy.exchanges] == ["late", "late"]
    assert proxy.deliver_late() == [200, 200]
    assert proxy.deliver_late() == []
    proxy.faults = [Fault("lost")]
    with pytest.raises(TimeoutError), urlopen(url, timeout=0.3) as answer:
        answer.read()
    assert proxy.deliver_late() == []
    assert get(url) == CONTENT


def test_failing_share_of_ranges_is_the_same_each_time(
    proxy: Proxy, upstream: tuple[str, str]
) -> None:
    url = f"{proxy.url}{upstream[1]}/x"
    failed: list[set[int]] = []
    for order in (range(100), reversed(range(100))):
        proxy.faults = [Fault("refuse", rate=0.2)]
        failed.append(set())
        for i in order:
            try:
                get(url, 10 * i, 10 * i + 9)
            except HTTPError:
                failed[-1].add(i)
                assert get(url, 10 * i, 10 * i + 9) == CONTENT[10 * i : 10 * i + 10]
    assert failed[0] == failed[1]
    assert 10 <= len(failed[0]) <= 30


def test_bandwidth_and_latency_are_as_configured(upstream: tuple[str, str]) -> None:
    address, folder = upstream
    with Proxy(address, latency_s=0.1, bytes_per_s=4e6) as proxy:
        began = time.monotonic()
        assert get(f"{proxy.url}{folder}/x") == CONTENT
        assert 0.1 + len(CONTENT) / 4e6 <= time.monotonic() - began


def test_proxy_in_its_own_process(upstream: tuple[str, str]) -> None:
    address, folder = upstream
    faults = [Fault("refuse", path="*/y")]
    with proxy_process(address, latency_s=0.05, faults=faults) as proxy:
        assert get(f"{proxy.url}{folder}/x", 0, 99) == CONTENT[:100]
        with pytest.raises(HTTPError, match="503"):
            get(f"{proxy.url}{folder}/y")
        assert proxy.counts() == {"num_requests": 2, "num_faults": 1, "num_bytes": 100}


def test_unavailable_upstream_server() -> None:
    with Proxy("http://127.0.0.1:9") as proxy, pytest.raises(HTTPError, match="502"):
        get(f"{proxy.url}/x")
