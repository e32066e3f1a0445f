"""Storage on this machine: atomic publishing, open files, and error messages.

Properties of every kind of storage are tested in ``tests/storage``.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gatdist.common.errors import ConfigError, StorageError, for_terminal
from gatdist.storage import Store
from gatdist.storage.local import OpenFiles
from gatdist.storage.store import at_file
from gatdist.storage.urls import absolute
from support import refused


def test_find_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"123")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "data" / ".b.0123.publishing").write_bytes(b"half")
    assert Store(str(tmp_path / "data")).find() == {"link/x": 3}


def test_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(StorageError, "config.json"):
        Store(str(tmp_path / "file" / "run")).publish("config.json", b"{}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_rejected(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with refused(StorageError, "x"):
        Store(str(tmp_path)).publish("x", b"")


def test_location_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("runs/a").is_local
    assert Store("runs/a").local_path("x/y") == tmp_path / "runs/a/x/y"
    assert Store("memory://").child("a").url == "memory://a"
    assert not Store("memory://a").is_local


def test_unknown_protocol_is_rejected() -> None:
    with refused(StorageError, "x"):
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
    with refused(ConfigError, "${env:GATDIST_TEST_ABSENT}"):
        Store("memory://x", {"client_kwargs": {"list": ["${env:GATDIST_TEST_ABSENT}"]}})


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {"authorization": "Bearer t0k3n"}},
        {"client_kwargs": {"headers": {"Authorization": "Bearer t0k3n"}}},
        {"client_kwargs": {"auth": "t0k3n"}},
    ],
)
def test_url_with_a_password_and_other_credentials_is_rejected(options: dict[str, Any]) -> None:
    with refused(StorageError, "x") as error:
        Store("https://me:s3cr3t@h.invalid/x", options)
    assert "s3cr3t" not in str(error.value)
    assert "t0k3n" not in str(error.value)
    Store("https://me:s3cr3t@h.invalid/x", {"headers": {"Accept": "*/*"}})


# Atomic publishing


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


def test_publisher_killed_half_way_leaves_the_old_content(tmp_path: Path) -> None:
    # The publisher copies from a pipe and is killed when it has read the first half.
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
        # More than a pipe can buffer: when this returns, the child has read some of it.
        writer.write(b"new" * 100_000)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert store.read("x") == b"old"
    assert store.list() == ["x"]


def test_failed_publish_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with pytest.raises(StorageError):
        store.publish_file("x", tmp_path / "absent")
    assert list((tmp_path / "store").iterdir()) == []


# Ranges of local files, which stay open


def open_files(folder: Path) -> list[str]:
    """Return names of the files in a folder that this process has open."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            links.append(os.readlink(descriptor))
    return sorted(Path(link).name for link in links if link.startswith(str(folder)))


def test_files_stay_open_until_the_store_is_deleted(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("a", "b"):
        store.publish(name, name.encode() * 10)
    for _ in range(3):
        assert store.read_ranges([("a", 1, 3), ("b", 1, 3), ("a", 0, 1)]) == [b"aa", b"bb", b"a"]
        assert open_files(tmp_path) == ["a", "b"]
    del store
    assert open_files(tmp_path) == []


def test_number_of_open_files_is_bounded(tmp_path: Path) -> None:
    files = OpenFiles(most=3)
    for i in range(10):
        (tmp_path / str(i)).write_bytes(bytes([i]))
    for _ in range(2):
        for i in (0, 1, 0, 2, 0, 3, 0, 4):
            assert files.read(str(tmp_path / str(i)), [(0, 1)]) == [bytes([i])]
            assert len(open_files(tmp_path)) <= 3
    assert open_files(tmp_path) == ["0", "3", "4"], "those that were read last"


def test_replaced_or_changed_file_is_read_anew(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.publish("x", b"old content")
    assert store.read_ranges([("x", 0, 3)]) == [b"old"]
    store.publish("x", b"new content")
    assert store.read_ranges([("x", 0, 3)]) == [b"new"]
    store.append("x", " that grew")
    assert store.read_ranges([("x", 12, 21)]) == [b"that grew"]
    assert open_files(tmp_path) == ["x"]
    os.truncate(tmp_path / "x", 5)
    with refused(StorageError, "x"):
        store.read_ranges([("x", 3, 9)])
    store.delete("x")
    with refused(StorageError, "x"):
        store.read_ranges([("x", 0, 3)])


def test_threads_read_while_others_close(tmp_path: Path) -> None:
    files = OpenFiles(most=2)
    for i in range(8):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 1000)
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            i, start = rng.randrange(8), rng.randrange(900)
            try:
                content = files.read(str(tmp_path / str(i)), [(start, start + 100)])
            except OSError as error:
                wrong.append(error)
            else:
                if content != [bytes([i]) * 100]:
                    wrong.append((i, content))

    threads = [threading.Thread(target=read, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(open_files(tmp_path)) <= 2


def test_unreadable_folder_or_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with refused(StorageError, "folder"):
        Store(str(tmp_path)).read_ranges([("folder", 0, 1)])


def test_programming_errors_are_not_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Store(str(tmp_path)).publish("x", "not bytes")  # type: ignore[arg-type]


def test_file_behind_a_link_is_replaced_and_a_device_is_not(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for content in (b"first", b"second"):
        store.publish("link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError):
        store.publish("pipe", b"content")
    assert (tmp_path / "pipe").is_fifo()


def test_url_with_a_nul_character_is_rejected() -> None:
    with pytest.raises(StorageError):
        Store("a\0b")


@pytest.mark.parametrize("kind", ["file", "link in a circle"])
def test_file_in_place_of_a_folder_is_named(tmp_path: Path, kind: str) -> None:
    obstacle = tmp_path / "runs"
    if kind == "file":
        obstacle.touch()
    else:
        obstacle.symlink_to("runs")
    store = Store(str(obstacle / "mine"))
    for act in (lambda: store.publish("a", b""), lambda: store.create("a", b"")):
        with refused(StorageError, f"{obstacle}/mine/a") as caught:
            act()
        assert f"{obstacle} " in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_link_to_a_missing_folder_creates_it_when_needed(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("scratch")
    store = Store(str(tmp_path / "runs/mine"))
    assert store.create("a", b"1")
    store.publish("b", b"2")
    assert {path.name for path in (tmp_path / "scratch/mine").iterdir()} == {"a", "b"}
    assert store.read("a") == b"1"


@pytest.mark.parametrize("name", ["n" * 300, "f/" + "n" * 300 + "/x"])
def test_name_that_is_too_long_is_rejected(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path / name))
    for act in (lambda: store.publish("a", b""), lambda: store.read("a"), store.list):
        with pytest.raises(StorageError):
            act()


def test_free_space_is_that_of_the_disk_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("/dev/shm/gatdist-is-not-there")
    assert Store(str(tmp_path / "run")).free_bytes() == Store("/dev/shm").free_bytes()


def test_message_contains_no_more_of_a_value_than_a_terminal_shows() -> None:
    error = StorageError("x" * 10**6, "must be short", value="y" * 10**6, hint="z" * 10**6)
    assert len(str(error)) < 10_000
    assert str(error).startswith("xxx")
    assert "must be short" in str(error)  # the given value


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_special_files_are_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    store = Store(str(tmp_path))
    for act in (
        lambda: store.read("a"),
        lambda: store.read_if_exists("a"),
        lambda: store.read_ranges([("a", 0, 3)]),
        lambda: store.append("a", "x"),
    ):
        with refused(StorageError, "a"):
            act()


def test_references_in_paths_are_replaced_before_they_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", str(tmp_path / "x"))
    monkeypatch.setenv("BUCKET", "memory://bucket")
    assert absolute("${env:HERE}/run") == f"{tmp_path}/x/run"
    assert absolute("${env:BUCKET}/run") == "${env:BUCKET}/run"
    Store(absolute("${env:BUCKET}/run")).publish("a", b"1")
    assert Store("memory://bucket/run").read("a") == b"1"
    with pytest.raises(StorageError):
        absolute("")
    assert absolute("s3:") == f"{tmp_path}/s3:"


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("/a/b", "/a", "b"),
        ("/b", "/", "b"),
        ("memory://a/b", "memory://a", "b"),
        ("memory://a/b/c", "memory://a/b", "c"),
        ("file:///tmp/b", "file:///tmp", "b"),
        ("https://host/a/b?sign=c/d", "https://host/a", "b?sign=c/d"),
        ("${env:FILE}", "memory://a", "b"),
        ("${env:FOLDER}/b", "${env:FOLDER}", "b"),
    ],
)
def test_folder_and_name_of_a_file(
    url: str, folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FILE", "memory://a/b")
    monkeypatch.setenv("FOLDER", "memory://a")
    store, found = at_file(url)
    assert (store.url, found) == (folder, name)


@pytest.mark.parametrize("url", ["foo://x", "s3://bucket", "memory://"])
def test_url_of_a_file_must_name_one_in_a_folder(url: str) -> None:
    with pytest.raises(StorageError):
        at_file(url)


def test_untrusted_text_is_escaped_for_the_terminal() -> None:
    assert for_terminal("a\x1b[2Jb\x07\x9b\rc\n\x1b[2md\te") == (
        "a\\x1b[2Jb\\x07\\x9b\\rc\n\x1b[2md\te"
    )
    assert len(for_terminal("x" * 10**6)) < 10_000
