"""Storage: what holds on every kind of it, atomic publishing, retries, how failures are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import pytest

from gatdist.errors import ConfigError, StorageError, StorageUnavailableError
from gatdist.storage import Store


@pytest.fixture(params=["local", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    urls = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid4()}"}
    return Store(f"{urls[request.param]}/folder")


def test_a_file_is_read_as_it_was_published(store: Store, tmp_path: Path) -> None:
    assert not store.exists()
    assert not store.exists("a/b.bin")
    store.publish("a/b.bin", b"first")
    store.publish("a/b.bin", b"0123456789")
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    store.publish_file("c.bin", source)
    assert store.read("a/b.bin") == b"0123456789"
    assert store.child("a").read("b.bin") == b"0123456789"
    assert store.read("c.bin") == b"from a file"
    assert store.size("a/b.bin") == 10
    assert store.exists()
    assert store.exists("a")


def test_ranges_come_in_the_order_asked(store: Store) -> None:
    store.publish("x", b"0123456789")
    store.publish("y", b"abcdef")
    ranges = [("y", 2, 4), ("x", 0, 10), ("x", 9, 10), ("y", 3, 3)]
    assert store.read_ranges(ranges) == [b"cd", b"0123456789", b"9", b""]
    assert store.read_ranges([]) == []


def test_a_range_past_the_end_is_an_error(store: Store) -> None:
    store.publish("x", b"0123456789")
    with pytest.raises(StorageError, match=r"x: gave 2 bytes for the range 8 to 12 \(of 10\)"):
        store.read_ranges([("x", 0, 3), ("x", 8, 12)])


def test_a_listing_has_immediate_names_only(store: Store) -> None:
    assert store.list() == []
    store.publish("b", b"")
    store.publish("a/x", b"")
    store.publish("a/y/z", b"")
    assert store.list() == ["a", "b"]
    assert store.list("a") == ["x", "y"]
    assert store.list("b") == []
    assert store.list("nowhere") == []


def test_all_files_below_a_folder_are_found_with_their_sizes(store: Store) -> None:
    assert store.find() == {}
    store.publish("b.bin", b"12")
    store.publish("a/x/c", b"")
    store.publish("a/d e.txt", b"123")
    assert list(store.find().items()) == [("a/d e.txt", 3), ("a/x/c", 0), ("b.bin", 2)]
    assert store.find("a") == {"a/x/c": 0, "a/d e.txt": 3}
    assert store.find("none") == {}
    assert store.find("b.bin") == {}


def test_finding_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"123")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "data" / ".b.0123.publishing").write_bytes(b"half")
    assert Store(str(tmp_path / "data")).find() == {"link/x": 3}


def test_append_creates_and_adds(store: Store) -> None:
    store.append("logs/lines", "one\n")
    store.append("logs/lines", "zwei – 2\n")
    assert store.read("logs/lines").decode() == "one\nzwei – 2\n"


def test_delete_takes_files_folders_and_nothing(store: Store) -> None:
    for name in ("a/x", "a/y/z", "b"):
        store.publish(name, b"1")
    store.delete("b")
    store.delete("a")
    store.delete("a")
    assert store.list() == []


@pytest.mark.parametrize("act", ["read", "size", "read_ranges"])
def test_what_is_missing_is_named(store: Store, act: str) -> None:
    actions: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("no.bin"),
        "size": lambda: store.size("no.bin"),
        "read_ranges": lambda: store.read_ranges([("no.bin", 0, 1)]),
    }
    with pytest.raises(StorageError, match=r"folder/no\.bin"):
        actions[act]()


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/run/config\.json"):
        Store(str(tmp_path / "file" / "run")).publish("config.json", b"{}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"not permitted .*Check its permissions"):
        Store(str(tmp_path)).publish("x", b"")


def test_where_a_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("runs/a").is_local
    assert Store("runs/a").local_path("x/y") == tmp_path / "runs/a/x/y"
    assert Store("memory://").child("a").url == "memory://a"
    assert not Store("memory://a").is_local


def test_an_unknown_protocol() -> None:
    with pytest.raises(StorageError, match=r"nosuch://x: can't be opened \(.*nosuch"):
        Store("nosuch://x")


def test_environment_variables_are_expanded_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATDIST_TEST_SECRET", "s3cr3t")
    store = Store(f"{tmp_path}/${{env:GATDIST_TEST_SECRET}}")
    store.publish("x", b"1")
    assert (tmp_path / "s3cr3t" / "x").read_bytes() == b"1"
    assert store.child("sub").url == f"{tmp_path}/${{env:GATDIST_TEST_SECRET}}/sub"
    with pytest.raises(StorageError) as error:
        store.read("no.bin")
    assert "s3cr3t" not in str(error.value)
    with pytest.raises(ConfigError, match=r"env:GATDIST_TEST_ABSENT"):
        Store("memory://x", {"client_kwargs": {"list": ["${env:GATDIST_TEST_ABSENT}"]}})


# Publishing whole or not at all


def test_readers_see_the_old_content_or_the_new(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    contents = {b"a" * 300_000, b"b" * 500_000}
    store.publish("x", b"a" * 300_000)
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(store.read("x"))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for content in contents:
            store.publish("x", content)
    stop.set()
    reader.join()
    assert seen
    assert seen <= contents


def test_a_publisher_killed_half_way_leaves_the_old_content(tmp_path: Path) -> None:
    # The publisher copies from a pipe, of which it has got the first half when it is killed.
    store = Store(str(tmp_path / "store"))
    store.publish("x", b"old")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = (
        "import sys, pathlib; from gatdist.storage import Store; "
        "Store(sys.argv[1]).publish_file('x', pathlib.Path(sys.argv[2]))"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "store"), str(pipe)])
    with pipe.open("wb", buffering=0) as writer:
        # More than a pipe holds: when this returns, the child has read some of it.
        writer.write(b"new" * 100_000)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert store.read("x") == b"old"
    assert store.list() == ["x"]


def test_a_failed_publish_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with pytest.raises(StorageError):
        store.publish_file("x", tmp_path / "absent")
    assert list((tmp_path / "store").iterdir()) == []


# Retries, against a real HTTP server that misbehaves as told


class Misbehaving(BaseHTTPRequestHandler):
    """Serves ``CONTENT``; the first requests are answered as ``faults`` says."""

    CONTENT = bytes(range(100))
    faults: ClassVar[list[object]] = []
    num_requests = 0

    def do_HEAD(self) -> None:
        self._answer(200, self.CONTENT, "", head=True)

    def do_GET(self) -> None:
        type(self).num_requests += 1
        fault = self.faults.pop(0) if self.faults else None
        wanted = self.headers.get("Range", "")
        if isinstance(fault, int):
            self._answer(fault, b"", "")
        elif not wanted or fault == "ignore range":
            self._answer(200, self.CONTENT, "")
        else:
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            body = self.CONTENT[first : last + 1]
            span = f"bytes {first}-{last}/{len(self.CONTENT)}"
            self._answer(206, body[: len(body) // 2] if fault == "short" else body, span)

    def _answer(self, status: int, body: bytes, span: str, head: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Misbehaving.faults, Misbehaving.num_requests = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("fault", [500, 503, 429])
def test_a_passing_failure_is_tried_again(server: str, fault: int) -> None:
    Misbehaving.faults = [fault]
    assert Store(server).read("x") == Misbehaving.CONTENT
    assert Misbehaving.num_requests == 2


def test_a_short_body_is_fetched_again(server: str) -> None:
    Misbehaving.faults = ["short", "short"]
    assert Store(server).read_ranges([("x", 10, 30)]) == [Misbehaving.CONTENT[10:30]]
    assert Misbehaving.num_requests == 3


def test_a_server_that_ignores_ranges_is_not_believed(server: str) -> None:
    Misbehaving.faults = ["ignore range"] * 2
    with pytest.raises(StorageError, match="gave 100 bytes for the range 10 to 30"):
        Store(server).read_ranges([("x", 10, 30)])


def test_storage_that_keeps_failing_is_told_apart(server: str) -> None:
    Misbehaving.faults = [503] * 1000
    with pytest.raises(StorageUnavailableError, match=r"/x: storage kept failing, \d attempts"):
        Store(server, retry_budget_s=0.4).read("x")
    assert Misbehaving.num_requests > 1


@pytest.mark.parametrize(
    ("fault", "told"), [(403, "not permitted"), (401, "not permitted"), (404, "does not exist")]
)
def test_a_lasting_failure_is_not_tried_again(server: str, fault: int, told: str) -> None:
    Misbehaving.faults = [fault]
    with pytest.raises(StorageError, match=told):
        Store(server).read("x")
    assert Misbehaving.num_requests == 1


def test_a_secret_in_the_url_is_not_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATDIST_TEST_SECRET", "s3cr3t")
    Misbehaving.faults = [403]
    with pytest.raises(StorageError) as error:
        Store(f"{server}/${{env:GATDIST_TEST_SECRET}}").read("x")
    assert "s3cr3t" not in str(error.value)


def test_mistakes_in_programs_are_not_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Store(str(tmp_path)).publish("x", "not bytes")  # type: ignore[arg-type]
