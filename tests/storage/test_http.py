"""Plain HTTP by nginx: read-only, with listings if the server generates index pages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from servers import NGINX_USER

from gatdist.common.errors import StorageError
from gatdist.storage import Store
from support import free_port, refused, wait_until

pytestmark = pytest.mark.storage

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def folder(nginx: tuple[str, Path]) -> tuple[str, Path]:
    """Return a folder's URL and path."""
    address, root = nginx
    name = str(uuid4())
    (root / name).mkdir()
    return f"{address}/{name}", root / name


@pytest.fixture
def store(folder: tuple[str, Path]) -> Store:
    url, path = folder
    (path / "x.bin").write_bytes(CONTENT)
    (path / "empty").write_bytes(b"")
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "y").write_bytes(b"abcdef")
    (path / "a" / "b" / "z").write_bytes(b"1")
    return Store(url, retry_budget_s=5)


def test_files_are_read(store: Store) -> None:
    assert store.read("x.bin") == CONTENT
    assert store.read("empty") == b""
    assert store.child("a").read("b/z") == b"1"
    ranges = [("a/y", 2, 4), ("x.bin", 255, 300), ("x.bin", 7, 7), ("x.bin", 0, len(CONTENT))]
    assert store.read_ranges(ranges) == [b"cd", CONTENT[255:300], b"", CONTENT]
    assert store.size("x.bin") == len(CONTENT)
    assert store.size("empty") == 0
    assert store.exists()
    assert store.exists("a")
    assert store.exists("a/y")
    assert not store.exists("a/no")


def test_index_page_is_a_listing(store: Store) -> None:
    assert store.list() == ["a", "empty", "x.bin"]
    assert store.list("a") == ["b", "y"]
    assert store.list("x.bin") == []
    assert store.list("nowhere") == []
    assert set(store.find()) == {"a/b/z", "a/y", "empty", "x.bin"}
    assert set(store.find("a")) == {"a/b/z", "a/y"}
    assert store.find("nowhere") == {}


@pytest.mark.parametrize("name", ["a b", "ü–漢", "50%", "a+b", "a&b=c", "a#b", "ab;c", "a~(b)'c"])
def test_unusual_names(folder: tuple[str, Path], name: str) -> None:
    url, path = folder
    (path / name).mkdir()
    (path / name / name).write_bytes(name.encode())
    store = Store(url)
    assert store.child(name).read(name) == name.encode()
    assert store.read_ranges([(f"{name}/{name}", 1, 2)]) == [name.encode()[1:2]]
    assert store.list(name) == [name]
    assert list(store.find()) == [f"{name}/{name}"]


@pytest.mark.parametrize(("name", "quoted"), [("a b", "a%20b"), ("a?b", "a%3Fb"), ("%41", "%2541")])
def test_names_are_quoted_in_urls(folder: tuple[str, Path], name: str, quoted: str) -> None:
    url, path = folder
    (path / name).write_bytes(b"1")
    assert Store(url).read(quoted) == b"1"
    assert Store(url).read(f"{quoted}?size=large") == b"1", "as in a list of URLs"
    (listed,) = Store(url).list()
    assert Store(url).read(listed) == b"1"


@pytest.mark.parametrize("start", [len(CONTENT) - 2, len(CONTENT), len(CONTENT) + 50])
def test_range_beyond_the_end_is_an_error(store: Store, start: int) -> None:
    arrived = max(0, len(CONTENT) - start)
    with refused(StorageError, "x.bin") as caught:
        store.read_ranges([("x.bin", start, start + 9)])
    for fact in (f" {arrived} bytes", f"{start} to {start + 9}", str(len(CONTENT))):
        assert fact in str(caught.value)


def test_missing_file_is_named(store: Store) -> None:
    for act in (store.read, store.size, lambda name: store.read_ranges([(name, 0, 1)])):
        with refused(StorageError, "a/no.bin"):
            act("a/no.bin")


def test_writing_is_rejected(store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"1")
    for act in (
        lambda: store.publish("new", b"1"),
        lambda: store.publish_file("new", tmp_path / "source"),
        lambda: store.append("new", "1"),
        lambda: store.delete("x.bin"),
    ):
        with refused(StorageError):
            act()
    assert store.list() == ["a", "empty", "x.bin"]


# Restricted servers


def test_known_names_need_no_listing(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    (root / "unlisted" / "manifest.json").write_text(json.dumps({"shards": ["shard-0.tar"]}))
    (root / "unlisted" / "shard-0.tar").write_bytes(CONTENT)
    store = Store(f"{address}/unlisted")
    (shard,) = json.loads(store.read("manifest.json"))["shards"]
    assert store.read_ranges([(shard, 100, 200)]) == [CONTENT[100:200]]
    for act in (store.list, store.find):
        with refused(StorageError, "unlisted") as caught:
            act()
        assert "(403 Forbidden)" in str(caught.value)


def test_forbidden_is_not_treated_as_missing(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    (root / "forbidden" / "x").write_bytes(b"1")
    store = Store(f"{address}/forbidden")
    for act in (store.read, store.size, store.exists, lambda n: store.read_ranges([(n, 0, 1)])):
        with refused(StorageError, "forbidden/x") as caught:
            act("x")
        assert "(403 Forbidden)" in str(caught.value)


def test_password_in_the_url_authenticates_and_is_not_shown(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    (root / "private" / "x").write_bytes(b"abc")
    user, password = NGINX_USER
    host = address.removeprefix("http://")
    assert Store(f"http://{user}:{password}@{host}/private").read_ranges([("x", 1, 3)]) == [b"bc"]
    wrong = Store(f"http://{user}:wr0ng-password@{host}/private")
    assert wrong.url == f"http://{user}:***@{host}/private"
    for act in (wrong.read, wrong.size, wrong.list, lambda n: wrong.read_ranges([(n, 0, 1)])):
        with refused(StorageError) as error:
            act("x")
        assert "(401" in str(error.value)
        assert "wr0ng" not in str(error.value)


def test_signature_in_the_query_is_sent_with_every_file(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    (root / "signed").mkdir()
    (root / "signed" / "x").write_bytes(b"abc")
    store = Store(f"{address}/signed?sig=s3cr3t")
    assert store.url == f"{address}/signed?sig=***"
    assert store.read_ranges([("x", 1, 3)]) == [b"bc"]
    assert not store.exists("no")
    with refused(StorageError, "signed/a/no?sig=***") as error:
        store.child("a").read("no")
    assert "s3cr3t" not in str(error.value)
    assert "(403" not in str(error.value)
    with refused(StorageError, "signed/x?sig=***") as error:
        Store(f"{address}/signed?sig=wr0ng").read("x")
    assert "(403" in str(error.value)


# Servers without range requests


def test_whole_files_are_not_treated_as_ranges(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    (root / "whole" / "x").write_bytes(CONTENT)
    store = Store(f"{address}/whole")
    with refused(StorageError, "x") as caught:
        store.read_ranges([("x", 10, 30)])
    for fact in (f" {len(CONTENT)} bytes", "10 to 30"):
        assert fact in str(caught.value)
    assert store.read("x") == CONTENT
    assert store.read_ranges([("x", 0, len(CONTENT))]) == [CONTENT], "all is all"


@pytest.fixture
def pythons(tmp_path: Path) -> Iterator[str]:
    """Python's own server, which has no range requests either and sends lengths of files."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(tmp_path)]
    server = subprocess.Popen(
        [*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        store = Store(f"http://127.0.0.1:{port}", retry_budget_s=10)
        wait_until(store.exists, "the server to answer")
        yield store.url
    finally:
        server.kill()
        server.wait()


def test_large_file_sent_instead_of_a_range_is_not_read(pythons: str, tmp_path: Path) -> None:
    # A sparse file: reading it would allocate 8 GiB of memory.
    with (tmp_path / "x").open("wb") as file:
        file.truncate(8 * 2**30)
    with refused(StorageError, "x"):
        Store(pythons).read_ranges([("x", 5, 9)])
