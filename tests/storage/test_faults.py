"""Storage faults: each kind of server behind a proxy that makes it fail."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from servers import Server, azure_options, s3_options

from benchmarks.proxy import Fault, Proxy
from gatdist.common.errors import StorageError, StorageUnavailableError
from gatdist.storage import Store, connection
from support import free_port, refused

pytestmark = pytest.mark.storage

CONTENT = bytes(range(256)) * 300
SERVERS = ["moto", "gcs", "azurite", "nginx"]
WRITABLE = SERVERS[:-1]


class Faulty(NamedTuple):
    """A folder with one file, ``x``, behind a proxy."""

    proxy: Proxy
    open: Callable[..., Store]

    @property
    def store(self) -> Store:
        return self.open(retry_budget_s=20)

    def store_for(self, kind: str) -> Store:
        """Return a store with the shortest timeouts that let a fault of this kind end."""
        stalls = kind in ("silence", "stall")
        return self.open(retry_budget_s=20, stall_s=1.0) if stalls else self.store

    @property
    def num_faults(self) -> int:
        return sum(bool(exchange.fault) for exchange in self.proxy.exchanges)


@pytest.fixture(scope="session")
def behind(request: pytest.FixtureRequest) -> Iterator[Faulty]:
    """Start a proxy for the server that tests select by :func:`each`.

    It is shared by them, since opening an S3 client takes a while.
    """
    server = request.getfixturevalue(request.param)
    is_bucket = isinstance(server, Server)
    with Proxy(server.address if is_bucket else server[0]) as proxy:
        if is_bucket:
            url, options = f"{server.new_bucket()}/data", server.options(proxy.url)
            Store(url, server.options(server.address)).publish("x", CONTENT)
        else:
            url, options = f"{proxy.url}/faults", {}
            (server[1] / "faults").mkdir(exist_ok=True)
            (server[1] / "faults" / "x").write_bytes(CONTENT)
        yield Faulty(proxy, partial(Store, url, options))


@pytest.fixture
def faulty(behind: Faulty) -> Iterator[Faulty]:
    """Return the same proxy without faults and with cleared counts."""
    # Trigger initial requests of libraries here; not by exists(), as gcsfs leaves some pending.
    behind.store.read_ranges([("x", 0, 10)])
    behind.proxy.exchanges.clear()
    yield behind
    behind.proxy.faults = []


def each(servers: Sequence[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("behind", servers, indirect=True, scope="session")


PASSING = {
    "500": Fault("refuse", status=500),
    "503": Fault("refuse", status=503),
    "429": Fault("refuse", status=429),
    "silence": Fault("silence"),
    "stall": Fault("stall"),
    "reset": Fault("reset"),
    "short": Fault("short"),
}
OF_RANGES = "bytes="  # header values of range requests only


@pytest.mark.parametrize("kind", PASSING)
@each(SERVERS)
def test_range_is_retried_until_it_is_complete(faulty: Faulty, kind: str) -> None:
    faulty.proxy.faults = [replace(PASSING[kind], holding=OF_RANGES)]
    assert faulty.store_for(kind).read_ranges([("x", 100, 70_000)]) == [CONTENT[100:70_000]]
    assert faulty.num_faults == 1
    assert len([e for e in faulty.proxy.exchanges if e.range and not e.fault]) == 1


@pytest.mark.parametrize("kind", ["503", "stall"])
@each(SERVERS)
def test_whole_file_is_retried(faulty: Faulty, kind: str) -> None:
    faulty.proxy.faults = [PASSING[kind]]
    assert faulty.store_for(kind).read("x") == CONTENT
    assert faulty.num_faults == 1


@each(SERVERS)
def test_only_the_store_retries(faulty: Faulty) -> None:
    """Without time for retries, an operation is one request, or those of a complete answer."""
    store = faulty.open(retry_budget_s=0.0, stall_s=0.5)
    is_azure = store.url.startswith("az:")
    for kind in ("503", "reset"):
        fault = PASSING[kind]
        faulty.proxy.faults = [Fault(fault.kind, status=503, requests=(0, 1000))]
        with pytest.raises(StorageUnavailableError):
            store.read_ranges([("x", 100, 70_000)])
        # Azure's library reads an interrupted answer three times, which can't be disabled.
        assert faulty.num_faults == (3 if is_azure and kind == "reset" else 1)
        faulty.proxy.exchanges.clear()
    faulty.proxy.faults = [Fault("refuse", methods=("GET", "HEAD"), requests=(0, 1000))]
    for act in (store.exists, store.size, store.list, store.find, store.read):
        with pytest.raises(StorageUnavailableError):
            act("x")


@each(SERVERS)
def test_failing_server_is_not_treated_as_a_missing_file(faulty: Faulty) -> None:
    store = faulty.store
    acts: list[tuple[Callable[[], object], object]] = [
        (lambda: store.exists("x"), True),
        (lambda: store.size("x"), len(CONTENT)),
        (store.list, ["x"]),
        (lambda: set(store.find()), {"x"}),
    ]
    for act, expected in acts:
        faulty.proxy.faults = [Fault("refuse", methods=("GET", "HEAD"), requests=(0, 2))]
        assert act() == expected
        assert faulty.num_faults
        faulty.proxy.exchanges.clear()


@each(SERVERS)
def test_hundred_ranges_that_all_fail_once_are_retried_together(faulty: Faulty) -> None:
    ranges = [("x", i * 700, (i + 1) * 700) for i in range(100)]
    faulty.proxy.faults = [Fault("refuse", rate=1.0)]
    assert b"".join(faulty.store.read_ranges(ranges)) == CONTENT[:70_000]
    statuses = Counter(exchange.status for exchange in faulty.proxy.exchanges)
    assert statuses == {503: 100, 206: 100}
    order = [exchange.status for exchange in faulty.proxy.exchanges]
    assert order == sorted(order, reverse=True), "each by itself would be asked for again at once"


@each(["moto", "nginx"])
def test_bad_range_does_not_affect_the_good_ones(faulty: Faulty) -> None:
    """As long as ranges arrive, the budget does not run out, and none is fetched twice."""
    faulty.proxy.faults = [Fault("reset", rate=0.3)]
    ranges = [("x", i * 70, (i + 1) * 70) for i in range(200)]
    assert b"".join(faulty.store.read_ranges(ranges)) == CONTENT[:14_000]
    asked = [exchange.range for exchange in faulty.proxy.exchanges]
    whole = [exchange for exchange in faulty.proxy.exchanges if not exchange.fault]
    assert len(set(asked)) == len(whole) == 200
    assert 30 < faulty.num_faults < 90


@pytest.mark.parametrize("concurrency", [1, 4])
def test_number_of_concurrent_requests(nginx: tuple[str, Path], concurrency: int) -> None:
    address, root = nginx
    (root / "x").write_bytes(CONTENT)
    with Proxy(address, latency_s=0.1) as slow:
        ranges = [("x", i, i + 10) for i in range(8)]
        Store(slow.url).read_ranges(ranges, concurrency=concurrency)
        assert slow.most_at_once == concurrency


# Time until an error is raised


@pytest.mark.parametrize("protocol", ["s3", "gs", "az", "http"])
def test_unavailable_server_raises_after_the_budget(protocol: str) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    url, options = {
        "s3": ("s3://bucket/run", s3_options(address, "test")),
        "gs": ("gs://bucket/run", {"endpoint_url": address, "token": "anon"}),
        "az": ("az://bucket/run", azure_options(address, "a2V5")),
        "http": (f"{address}/run", {}),
    }[protocol]
    store = Store(url, options, retry_budget_s=0.2)
    acts = [store.read, store.exists, store.list, lambda name: store.read_ranges([(name, 0, 1)])]
    if protocol != "http":
        acts.append(lambda name: store.publish(name, b"1"))
    for act in acts:
        began = time.monotonic()
        with pytest.raises(StorageUnavailableError):
            act("x")
        assert 0.2 <= time.monotonic() - began < 10  # no library waits by itself


def test_slow_operation_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "_WARN_AFTER_S", 0.1)
    store = Store(f"http://user:secret@127.0.0.1:{free_port()}/run", retry_budget_s=1.0)
    with pytest.raises(StorageUnavailableError):
        store.read("x")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "run/x" in record.getMessage()
    assert "secret" not in record.getMessage()
    caplog.clear()
    with ThreadPoolExecutor(1) as pool, pytest.raises(StorageUnavailableError):
        pool.submit(store.read, "x").result()
    assert not caplog.records  # background threads report by other means


@each(SERVERS)
def test_stalled_connection_counts_as_a_failure(faulty: Faulty) -> None:
    faulty.proxy.faults = [Fault("silence", requests=(0, 1000))]
    began = time.monotonic()
    with pytest.raises(StorageUnavailableError):
        faulty.open(retry_budget_s=0.3, stall_s=0.4).read_ranges([("x", 0, 10)])
    assert 0.8 < time.monotonic() - began < 10


@each(SERVERS)
def test_stalled_listing_counts_as_a_failure(faulty: Faulty) -> None:
    methods = ("GET", "HEAD")
    faulty.proxy.faults = [Fault("silence", methods=methods, requests=(0, 1000))]
    began = time.monotonic()
    for act in (Store.exists, Store.list):
        with pytest.raises(StorageUnavailableError):
            act(faulty.open(retry_budget_s=0, stall_s=0.3), "x")
    assert 0.6 < time.monotonic() - began < 10


@each(SERVERS)
def test_retry_after_header_is_respected(faulty: Faulty) -> None:
    faulty.proxy.faults = [Fault("refuse", headers={"Retry-After": "1"})]
    began = time.monotonic()
    assert faulty.store.read_ranges([("x", 0, 10)]) == [CONTENT[:10]]
    assert time.monotonic() - began >= 1.0


@each(["nginx"])
def test_retry_after_header_beyond_the_budget(faulty: Faulty) -> None:
    store = faulty.open(retry_budget_s=0.5)
    faulty.proxy.faults = [Fault("refuse", status=429, headers={"Retry-After": "3600"})]
    began = time.monotonic()
    assert store.read_ranges([("x", 0, 10)]) == [CONTENT[:10]], "once more, when the time is up"
    faulty.proxy.faults = [
        Fault("refuse", status=429, headers={"Retry-After": "3600"}, requests=(0, 1000))
    ]
    with refused(StorageUnavailableError) as caught:
        store.read_ranges([("x", 0, 10)])
    for fact in ("2 attempts", "429"):
        assert fact in str(caught.value)
    assert time.monotonic() - began < 60  # instead of an hour


# Lasting failures


# Not Azure: its signature covers the range, so no proxy can remove it.
@each(["moto", "gcs", "nginx"])
def test_server_that_ignores_ranges_is_reported(faulty: Faulty) -> None:
    ranges = [("x", 0, len(CONTENT)), ("x", 10, 30)]
    faulty.proxy.faults = [Fault("ignore_range", requests=(0, 2))]
    assert faulty.store.read_ranges(ranges) == [CONTENT, CONTENT[10:30]], "once may be a bad cache"
    faulty.proxy.faults = [Fault("ignore_range", requests=(0, 1000))]
    with refused(StorageError, "x"):
        faulty.store.read_ranges(ranges)
    assert faulty.num_faults == 5


@pytest.mark.parametrize("status", [403, 404, 501])
@each(SERVERS)
def test_lasting_failure_is_not_retried(faulty: Faulty, status: int) -> None:
    faulty.proxy.faults = [Fault("refuse", status=status, requests=(0, 1000))]
    with refused(StorageError, "x"):
        faulty.store.read_ranges([("x", 0, 10)])
    assert faulty.num_faults == 1


# Writing


@pytest.mark.parametrize("kind", ["503", "reset"])
@each(WRITABLE)
def test_publish_is_retried(faulty: Faulty, kind: str, tmp_path: Path) -> None:
    fault = PASSING[kind]
    source = tmp_path / "source"
    source.write_bytes(CONTENT[1:])
    for act in (
        lambda: faulty.store.publish("y", CONTENT[1:]),
        lambda: faulty.store.publish_file("y", source),
    ):
        faulty.proxy.faults = [Fault(fault.kind, methods=("PUT", "POST"))]
        act()
        assert faulty.num_faults == 1
        assert faulty.store.read("y") == CONTENT[1:]
        faulty.proxy.exchanges.clear()


@each(WRITABLE)
def test_delete_of_a_folder_is_retried(faulty: Faulty) -> None:
    faulty.store.publish("a/y", b"1")
    faulty.store.publish("a/z", b"1")
    faulty.proxy.faults = [Fault("refuse", methods=("DELETE", "POST", "GET"), requests=(0, 1))]
    faulty.store.delete("a")
    assert faulty.num_faults
    assert not faulty.store.exists("a")
