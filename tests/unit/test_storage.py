"""Storage: what holds on every kind of it, atomic publishing, retries, how failures are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gatdist.errors import ConfigError, StorageError
from gatdist.storage import Store


def test_finding_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"123")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "data" / ".b.0123.publishing").write_bytes(b"half")
    assert Store(str(tmp_path / "data")).find() == {"link/x": 3}


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


def test_mistakes_in_programs_are_not_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Store(str(tmp_path)).publish("x", "not bytes")  # type: ignore[arg-type]
