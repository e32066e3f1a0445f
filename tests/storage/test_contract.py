"""Properties of every writable kind of storage, on real servers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from gatdist.common.errors import StorageError
from gatdist.storage import Store
from support import refused

SERVERS = ["moto", "s3rver", "gcs", "azurite"]


@dataclass(frozen=True)
class Place:
    """A bucket, or a folder, of a kind of storage."""

    url: str
    options: dict[str, Any]

    def store(self, folder: str = "runs/a") -> Store:
        return Store(f"{self.url}/{folder}", self.options)


@pytest.fixture(
    params=["local", "file", "memory"]
    + [pytest.param(server, marks=pytest.mark.storage) for server in SERVERS]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param in SERVERS:
        server = request.getfixturevalue(request.param)
        return Place(server.new_bucket(), server.options(server.address))
    urls = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid4()}"}
    return Place(urls[request.param], {})


@pytest.fixture
def store(place: Place) -> Store:
    return place.store()


def test_published_file_is_read_back(store: Store, tmp_path: Path) -> None:
    store.publish("a/b.bin", b"first")
    store.publish("a/b.bin", b"0123456789")
    source = tmp_path / "source"
    source.write_bytes(b"from a file" * 1000)
    store.publish_file("c.bin", source)
    store.publish("empty", b"")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.child("a").read("b.bin") == b"0123456789"
    assert store.read("c.bin") == b"from a file" * 1000
    assert store.read("empty") == b""
    assert store.size("a/b.bin") == 10
    assert store.size("empty") == 0


def test_folder_exists_as_long_as_it_contains_something(store: Store) -> None:
    assert not store.exists()
    assert not store.exists("a/b.bin")
    store.publish("a/b.bin", b"1")  # one file only: s3rver can't list a part of several
    for name in ("", "a", "a/b.bin"):
        assert store.exists(name)
    assert not store.exists("b.bin")
    assert not store.exists("a/b")


def test_ranges_are_returned_in_the_requested_order(store: Store) -> None:
    store.publish("x", b"0123456789")
    store.publish("y", b"abcdef")
    # None includes the first byte only, for which s3rver sends the whole file.
    ranges = [("y", 2, 4), ("x", 0, 10), ("x", 9, 10), ("y", 3, 3), ("x", 0, 2), ("x", 0, 10)]
    contents = [b"cd", b"0123456789", b"9", b"", b"01", b"0123456789"]
    assert store.read_ranges(ranges) == contents
    assert store.read_ranges(ranges, concurrency=1) == contents
    assert store.read_ranges([]) == []


@pytest.mark.parametrize(("start", "stop"), [(8, 12), (10, 11), (50, 60)])
def test_range_beyond_the_end_is_an_error(store: Store, start: int, stop: int) -> None:
    store.publish("x", b"0123456789")
    with refused(StorageError, "x") as caught:
        store.read_ranges([("x", 0, 3), ("x", start, stop)])
    assert f" {max(0, 10 - start)} bytes" in str(caught.value)


def test_listing_has_immediate_names_only(store: Store) -> None:
    assert store.list() == []
    store.publish("b", b"")
    store.publish("a/x", b"")
    store.publish("a/y/z", b"")
    assert store.list() == ["a", "b"]
    assert store.list("a") == ["x", "y"]
    assert store.list("b") == []
    assert store.list("nowhere") == []


def test_find_returns_all_files_below_a_folder_with_their_sizes(store: Store) -> None:
    assert store.find() == {}
    store.publish("b.bin", b"12")
    store.publish("a/x/c", b"")
    store.publish("a/d e.txt", b"123")
    assert list(store.find().items()) == [("a/d e.txt", 3), ("a/x/c", 0), ("b.bin", 2)]
    assert store.find("a") == {"a/x/c": 0, "a/d e.txt": 3}
    assert store.find("none") == {}
    assert store.find("b.bin") == {}


@pytest.mark.parametrize("name", ["a b", "ü–漢", "50%", "a+b", "a%20b", "a&b=c"])
def test_unusual_names(store: Store, name: str) -> None:
    store.publish(f"folder {name}/{name}", name.encode())
    assert store.read_ranges([(f"folder {name}/{name}", 0, 2)]) == [name.encode()[:2]]
    assert store.list(f"folder {name}") == [name]
    assert list(store.find()) == [f"folder {name}/{name}"]


def test_append_creates_and_extends(store: Store) -> None:
    store.append("logs/lines", "one\n")
    store.append("logs/lines", "zwei – 2\n")
    assert store.read("logs/lines").decode() == "one\nzwei – 2\n"


def test_delete_removes_files_and_folders_and_ignores_missing_ones(store: Store) -> None:
    for name in ("a/x", "a/y/z", "b"):
        store.publish(name, b"1")
    store.delete("b")
    store.delete("a")
    store.delete("a")
    assert store.list() == []


def test_changes_by_others_are_visible_at_once(place: Place) -> None:
    store, other = place.store(), place.store()
    assert other.list() == []
    store.publish("x", b"1")
    assert other.list() == ["x"]
    assert other.read_ranges([("x", 0, 1)]) == [b"1"]
    store.publish("x", b"22")
    assert other.size("x") == 2
    assert other.read_ranges([("x", 0, 2)]) == [b"22"]
    store.delete("x")
    assert not other.exists("x")


ACTIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("no.bin"),
    "size": lambda store: store.size("no.bin"),
    "read_ranges": lambda store: store.read_ranges([("no.bin", 0, 1)]),
}


@pytest.mark.parametrize("act", ACTIONS)
def test_missing_file_is_named(store: Store, act: str) -> None:
    with refused(StorageError, "no.bin"):
        ACTIONS[act](store)


def test_store_can_be_pickled(store: Store) -> None:
    store.publish("a/x", b"1")
    again = pickle.loads(pickle.dumps(store.child("a")))
    assert again.url == f"{store.url}/a"
    assert again.read("x") == b"1"


# Buckets, which a store never creates


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.storage
def test_missing_bucket_is_rejected(server: Any) -> None:
    store = Store(f"{server.protocol}://no-such-bucket/x", server.options(server.address))
    for act in [*ACTIONS.values(), lambda store: store.publish("no.bin", b"")]:
        with refused(StorageError, "no.bin"):
            act(store)
    with refused(StorageError, "x"):
        store.publish("x", b"1")
    assert not store.exists()
    assert store.list() == []
    assert store.find() == {}


@pytest.mark.storage
def test_bucket_deleted_during_reads(server: Any) -> None:
    bucket = server.new_bucket()
    store = Store(bucket, server.options(server.address))
    store.publish("x", b"0123456789")
    assert store.read_ranges([("x", 1, 3)]) == [b"12"]
    store.delete("x")
    server.file_system().rmdir(bucket.partition("://")[2])
    with refused(StorageError, "x"):
        store.read_ranges([("x", 1, 3)])


FORK = """
import json, os, sys
from gatdist.storage import Store

store = Store(sys.argv[1], json.loads(sys.argv[2]), retry_budget_s=5)
assert store.read_ranges([("x", 1, 3)]) == [b"12"]
child = os.fork()
for _ in range(5):
    assert store.read_ranges([("x", 1, 3), ("x", 2, 5)]) == [b"12", b"234"]
assert store.list() == ["x"]
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


@pytest.mark.storage
@pytest.mark.parametrize("server", ["moto", "azurite"], indirect=True)
def test_store_works_after_a_fork(server: Any) -> None:
    """As in a torch DataLoader: fsspec's thread and connections exist only in the parent."""
    bucket = server.new_bucket()
    options = server.options(server.address)
    Store(bucket, options).publish("x", b"0123456789")
    program = [sys.executable, "-c", FORK, bucket, json.dumps(options)]
    ended = subprocess.run(program, timeout=300, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
