"""Overlapping attempts, and delayed or repeated requests: committed data is never damaged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
import torch
from servers import Server

from benchmarks.proxy import Fault, Proxy
from gatdist.common.errors import GatdistError, StaleAttemptError, StorageUnavailableError
from gatdist.runs import Checkpoints, Retention, RunDirectory, read_checkpoint, read_lines
from gatdist.storage import Store

pytestmark = pytest.mark.storage

WRITES = ("PUT", "POST")
CASES = {
    "late deletes": [Fault("late", methods=("DELETE",), requests=(0, 1000))],
    "late writes": [Fault("late", methods=WRITES, requests=(0, 1000))],
    "late manifest": [Fault("late", methods=WRITES, path="*MANIFEST.json", requests=(0, 1000))],
    "late manifest and deletes": [
        Fault("late", methods=WRITES, path="*MANIFEST.json"),
        Fault("late", methods=("DELETE",), requests=(0, 1000)),
    ],
    "lost answers": [Fault("lost", methods=(*WRITES, "DELETE"))],
}


class Attempt(NamedTuple):
    """An attempt as in the training loop, with ``keep_checkpoints = 1``."""

    directory: RunDirectory
    checkpoints: Checkpoints
    warnings: list[str]

    @classmethod
    def of(cls, run: Store) -> Attempt:
        directory, warnings = RunDirectory(run), list[str]()
        found = Checkpoints(
            run.child("checkpoints"),
            Retention(newest=1),
            may_commit=directory.require_current,
            on_commit=directory.note_commit,
            on_warning=warnings.append,
        ).newest()
        directory.start_attempt(["here"], found.state["at"] if found else None, "test")
        checkpoints = Checkpoints(
            run.child("checkpoints"),
            Retention(newest=1),
            may_commit=directory.require_current,
            on_commit=directory.note_commit,
            on_warning=warnings.append,
        )
        return cls(directory, checkpoints, warnings)

    def save(self, at: int) -> None:
        value = float(at * 1000 + self.directory.attempt)
        self.checkpoints.save(
            at,
            {"generator/w": torch.full((5,), value), "average/w": torch.full((5,), value)},
            {"at": at, "attempt": self.directory.attempt},
            attempt=self.directory.attempt,
        )
        self.checkpoints.wait()


@pytest.fixture(params=["moto", "azurite", "gcs"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.address) as proxy:
        yield proxy


def whole(run: Store) -> list[dict[str, int]]:
    """Return the state of each committed checkpoint, all of which must verify."""
    folder = run.child("checkpoints")
    return [read_checkpoint(folder.child(name)).state for name in Checkpoints(folder).committed()]


@pytest.mark.parametrize("case", CASES)
def test_delayed_requests_of_a_stale_attempt_destroy_nothing(
    server: Server, proxy: Proxy, case: str
) -> None:
    """They arrive when a later attempt has committed the same and later checkpoints, and pruned."""
    if server.protocol == "gs" and "manifest" in case:
        pytest.skip("an upload's URL does not name the file")
    url = f"{server.new_bucket()}/run"
    run = Store(url, server.options(server.address))
    stale = Attempt.of(Store(url, server.options(proxy.url), retry_budget_s=0.5, stall_s=0.5))
    stale.save(1)
    proxy.faults = CASES[case]
    with suppress(StorageUnavailableError):
        stale.save(2)
    current = Attempt.of(run)
    for at in (2, 3):
        current.save(at)
    proxy.faults = []
    late = proxy.deliver_late()
    assert bool(late) == (case != "lost answers")
    newest = Checkpoints(run.child("checkpoints")).newest()
    assert newest is not None
    assert newest.state == {"at": 3, "attempt": 2}
    with pytest.raises(StaleAttemptError):
        stale.directory.require_current()
    # What arrived late is deleted, and the run continues.
    current.save(4)
    assert whole(run) == [{"at": 4, "attempt": 2}]
    assert not current.warnings
    for attempt in (stale, current):
        with suppress(GatdistError):
            attempt.checkpoints.close()


@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_stale_attempt_that_resumes_between_commit_and_prune_deletes_nothing(
    server: Server,
) -> None:
    """It checks the fence before the next attempt starts, and lists afterwards."""
    run = Store(f"{server.new_bucket()}/run", server.options(server.address))
    stale = Attempt.of(run)
    stale.save(1)
    others: list[Attempt] = []

    def sleep() -> None:  # 40 s, in which this happens
        others.append(Attempt.of(run))
        for at in (2, 3):
            others[0].save(at)

    stale.checkpoints._on_commit = sleep
    stale.save(4)
    (current,) = others
    assert {"at": 3, "attempt": 2} in whole(run)
    current.save(5)
    assert whole(run) == [{"at": 5, "attempt": 2}]
    with pytest.raises(StaleAttemptError):
        stale.save(6)
    current.checkpoints.close()
    with suppress(StaleAttemptError):
        stale.checkpoints.close()


def test_of_concurrent_starts_on_object_stores_exactly_one_is_current(
    server: Server,
) -> None:
    run = Store(f"{server.new_bucket()}/run", server.options(server.address))
    directories = [RunDirectory(run) for _ in range(4)]
    barrier = threading.Barrier(4)

    def start(directory: RunDirectory) -> None:
        barrier.wait()
        directory.start_attempt(["here"], None, "test")

    threads = [threading.Thread(target=start, args=[each]) for each in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    current = []
    for directory in directories:
        with suppress(StaleAttemptError):
            directory.require_current()
            current.append(directory)
    assert len(current) == 1
    if server.protocol != "gs":  # its emulator ignores ifGenerationMatch
        assert sorted(each.attempt for each in directories) == [1, 2, 3, 4]
        assert current[0].attempt == 4
    assert read_lines(run, "attempts.jsonl")


# Creating a file unless it exists


def test_of_many_writers_one_creates_a_file(server: Server) -> None:
    if server.protocol == "gs":
        pytest.skip("the emulator ignores ifGenerationMatch")
    store = Store(server.new_bucket(), server.options(server.address))
    contents = [str(i).encode() for i in range(8)]
    created: list[bytes] = []

    def create(content: bytes) -> None:
        if store.create("a/x", content):
            created.append(content)

    threads = [threading.Thread(target=create, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert created == [store.read("a/x")]
    assert not store.create("a/x", b"later")


def test_conditional_write_with_a_lost_answer_recognizes_its_own_data(
    server: Server, proxy: Proxy
) -> None:
    store = Store(server.new_bucket(), server.options(proxy.url), stall_s=0.5)
    proxy.faults = [Fault("lost", methods=WRITES)]
    assert store.create("x", b"mine")
    assert [exchange.fault for exchange in proxy.exchanges].count("lost") == 1
    assert store.read("x") == b"mine"


def test_conditional_write_rejected_as_existing_returns_false(server: Server, proxy: Proxy) -> None:
    store = Store(server.new_bucket(), server.options(proxy.url))
    store.publish("x", b"theirs")
    proxy.faults = [Fault("refuse", methods=WRITES, status=412)]
    assert not store.create("x", b"mine")
    assert store.read("x") == b"theirs"


@pytest.mark.parametrize("server", ["moto"], indirect=True)
@pytest.mark.parametrize("status", [400, 501])
def test_s3_server_without_conditional_writes(server: Server, proxy: Proxy, status: int) -> None:
    code = {400: "InvalidArgument", 501: "NotImplemented"}[status]
    body = f"<Error><Code>{code}</Code><Message>If-None-Match.</Message></Error>"
    store = Store(server.new_bucket(), server.options(proxy.url))
    for content, created in ((b"first", True), (b"second", False)):
        proxy.faults = [Fault("refuse", methods=("PUT",), status=status, body=body)]
        assert store.create("x", content) == created
    assert store.read("x") == b"first"


# Housekeeping


REFUSALS = {
    "bulk delete without Content-MD5": Fault(
        "refuse", methods=("POST",), status=400, requests=(0, 1000),
        body="<Error><Code>MissingContentMD5</Code><Message>Missing.</Message></Error>",
    ),
    "bulk delete not implemented": Fault(
        "refuse", methods=("POST",), status=501, requests=(0, 1000),
        body="<Error><Code>NotImplemented</Code><Message>No.</Message></Error>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("server", ["moto"], indirect=True)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_housekeeping_needs_no_bulk_delete(server: Server, proxy: Proxy, refusal: str) -> None:
    attempt = Attempt.of(Store(f"{server.new_bucket()}/run", server.options(proxy.url)))
    proxy.faults = [REFUSALS[refusal]]
    for at in (1, 2, 3):
        attempt.save(at)
    attempt.checkpoints.close()
    assert not attempt.warnings
    assert len(attempt.checkpoints.committed()) == 1


@pytest.mark.parametrize("status", [403, 503])
def test_failing_housekeeping_warns_once_and_is_retried_at_the_next_commit(
    server: Server, proxy: Proxy, status: int
) -> None:
    url = f"{server.new_bucket()}/run"
    run = Store(url, server.options(proxy.url), retry_budget_s=0.2)
    attempt = Attempt.of(run)
    refuse = Fault("refuse", methods=("DELETE",), status=status, requests=(0, 1000))
    attempt.save(1)
    proxy.faults = [refuse]
    for at in (2, 3):
        attempt.save(at)
    assert len(attempt.warnings) == 1
    assert len(attempt.checkpoints.committed()) == 3
    proxy.faults = []
    attempt.save(4)
    assert whole(run) == [{"at": 4, "attempt": 1}]
    attempt.checkpoints.close()
