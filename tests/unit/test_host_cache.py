"""The cache of a host: many processes, a byte limit, kills, and unusable folders."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gatdist.common.errors import StorageError
from gatdist.data.reading.host_cache import HostCache, block_key
from support import refused, wait_until

SIZE = 1000
KEYS = [block_key("f" * 64, i, i + 1) for i in range(60)]


PART = f"{'0' * 40}.block-{'1' * 16}.part"


def content_of(i: int) -> bytes:
    return random.Random(i).randbytes(SIZE)


def sweep(folder: Path, max_bytes: int = 10**6) -> None:
    """Start a process's cache, and wait for its sweep."""
    HostCache(str(folder), max_bytes)
    for thread in threading.enumerate():
        if thread.name == "gatdist-cache-sweep":
            thread.join()


class Loads:
    """Loads missing blocks, and counts the loads."""

    def __init__(self, keys: list[str] = KEYS) -> None:
        self.keys, self.count = keys, 0
        self.lock = threading.Lock()

    def __call__(self, numbers: list[int]) -> list[bytes]:
        with self.lock:
            self.count += len(numbers)
        return [content_of(KEYS.index(self.keys[i])) for i in numbers]


def get(cache: HostCache, numbers: list[int]) -> int:
    """Fetch blocks, check them, and return how many had to be loaded."""
    loads = Loads([KEYS[i] for i in numbers])
    assert cache.fetch(loads.keys, loads) == [content_of(i) for i in numbers]
    return loads.count


def files(folder: Path, suffix: str = ".block") -> list[Path]:
    return sorted(folder.glob(f"*/*{suffix}"))


def test_block_fetched_once_is_cached_for_all(tmp_path: Path) -> None:
    cache = HostCache(str(tmp_path), 10**6)
    assert get(cache, [3, 1, 2]) == 3
    assert get(cache, [1, 2, 3, 4]) == 1
    assert cache.hits == 3
    assert get(HostCache(str(tmp_path), 10**6), [4, 3]) == 0
    assert cache.fetch([], Loads()) == []
    # The same position in another shard is another block.
    other = [block_key("e" * 64, 1, 2)]
    assert cache.fetch(other, lambda _: [b"other"]) == [b"other"]
    assert get(cache, [1]) == 0
    assert cache.notes == []


def test_recently_used_blocks_stay_within_the_limit(tmp_path: Path) -> None:
    limit = 20 * (SIZE + 100)
    cache = HostCache(str(tmp_path), limit)
    for i in range(60):
        get(cache, [i])
        get(cache, [0])  # in use all the time
        assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert get(cache, [0, 59, 58, 57, 56, 55]) == 0
    assert get(cache, list(range(1, 30))) == 29
    larger = os.urandom(2 * limit)
    assert cache.fetch([block_key("d" * 64, 0, 1)], lambda _: [larger]) == [larger]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "long", "length"])
def test_damaged_block_is_fetched_again(tmp_path: Path, damage: str) -> None:
    cache = HostCache(str(tmp_path), 10**6)
    get(cache, [7])
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[500] ^= 1 if damage == "flip" else 0
    content[12:20] = b"\xff" * 8 if damage == "length" else content[12:20]
    kept = {"cut": content[:-1], "empty": b"", "long": content + b"x"}.get(damage, content)
    path.write_bytes(kept)
    assert get(cache, [7]) == 1
    assert get(cache, [7]) == 0
    cache.forget(KEYS[7])
    cache.forget(KEYS[7])
    assert get(cache, [7]) == 1


def test_threads_fetch_each_block_once(tmp_path: Path) -> None:
    cache = HostCache(str(tmp_path), 10**6)
    loads = Loads()

    def slowly(numbers: list[int]) -> list[bytes]:
        time.sleep(0.02)
        return loads(numbers)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: cache.fetch(KEYS, slowly), range(4)))
    assert loads.count == len(KEYS)
    assert all(result == [content_of(i) for i in range(60)] for result in results)


def test_later_process_does_not_sweep_a_block_being_written(tmp_path: Path) -> None:
    cache = HostCache(str(tmp_path), 10**6)
    over = threading.Event()

    def come() -> None:
        while not over.is_set():
            HostCache(str(tmp_path), 10**6)

    comer = threading.Thread(target=come)
    comer.start()
    try:
        for _ in range(20):
            for i in range(len(KEYS)):
                cache.forget(KEYS[i])
                get(cache, [i])
    finally:
        over.set()
        comer.join()
    assert cache.notes == []


# A process that imports gatdist and forks the processes under test.
FORKS = """
import json, os, random, signal, sys, time
from gatdist.data.reading.host_cache import HostCache, block_key

def content_of(i):
    return random.Random(i).randbytes(200_000)

def key_of(i):
    return block_key("f" * 64, i, 0)

def start(work, *args):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.write(write, json.dumps(work(*args)).encode())
        os._exit(0)
    os.close(write)
    return pid, open(read)
"""

SHARES = """
def fetch_all(order):
    cache, loaded = HostCache(sys.argv[1], 10**9), 0

    def load(numbers):
        nonlocal loaded
        time.sleep(0.005)
        loaded += len(numbers)
        return [content_of(group[i]) for i in numbers]

    for at in range(0, len(order), 4):
        group = order[at : at + 4]
        found = cache.fetch([key_of(i) for i in group], load)
        assert found == [content_of(i) for i in group]
    return loaded

forward = list(range(60))
started = [start(fetch_all, order) for order in (forward, forward, forward[::-1])]
print(json.dumps([json.load(pipe) for _, pipe in started]))
"""

FILLS = """
def fill(seed):
    cache, i = HostCache(sys.argv[1], 40 * 200_000), seed
    while True:
        group = [(i + k) % 100 for k in range(3)]
        cache.fetch([key_of(i) for i in group], lambda n: [content_of(group[k]) for k in n])
        i += 3

chance = random.Random(0)
for _ in range(15):
    started = [start(fill, chance.randrange(100)) for _ in range(2)]
    time.sleep(chance.uniform(0, 0.1))
    for pid, _ in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""


def run_script(script: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", FORKS + script, str(folder), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_processes_fetch_each_block_about_once(tmp_path: Path) -> None:
    loads = json.loads(run_script(SHARES, tmp_path))
    assert 60 <= sum(loads) <= 1.2 * 60
    assert len(files(tmp_path)) == 60


def test_kills_leave_nothing_to_clean_up(tmp_path: Path) -> None:
    run_script(FILLS, tmp_path)
    own = tmp_path / "gatdist-blocks-1"
    (own / PART).write_bytes(b"torn")
    began = time.monotonic()
    cache = HostCache(str(tmp_path), 40 * 200_000)
    wait_until(lambda: files(tmp_path, ".part") == [], "the sweep")
    used = sum(p.stat().st_size for p in files(tmp_path))
    wait_until(lambda: int((own / "usage").read_text()) == used, "the count of bytes")
    contents = [random.Random(i).randbytes(200_000) for i in range(100)]
    keys = [block_key("f" * 64, i, 0) for i in range(100)]
    assert cache.fetch(keys, lambda numbers: [contents[i] for i in numbers]) == contents
    assert cache.hits > 5
    assert time.monotonic() - began < 10  # no lock is left
    assert sum(p.stat().st_size for p in files(tmp_path)) <= 40 * 200_000


def test_block_being_written_is_not_swept(tmp_path: Path) -> None:
    sweep(tmp_path)
    path = tmp_path / "gatdist-blocks-1" / PART
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(tmp_path)
        assert path.exists()
    sweep(tmp_path)
    assert not path.exists()


def test_cache_never_follows_or_deletes_files_of_others(tmp_path: Path) -> None:
    """Links, pipes, foreign names, and files of another user, in a world-writable folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "treasure").write_bytes(bytes(5000))
    cache_dir = tmp_path / "cache"
    own = cache_dir / "gatdist-blocks-1"
    own.mkdir(parents=True)
    own.chmod(0o777)
    (own / f"{KEYS[0]}.block").symlink_to(outside / "treasure")
    (own / PART).symlink_to(outside / "treasure")
    os.mkfifo(own / f"{KEYS[1]}.block")
    (own / "notes.block").write_bytes(b"a foreign file")
    (own / f"{KEYS[2]}.block.bak").write_bytes(b"a foreign file")
    (own / "usage").symlink_to(outside / "treasure")
    (own / "sub.part").mkdir()
    if os.geteuid() == 0:
        (own / f"{KEYS[3]}.block").write_bytes(b"of another user")
        os.chown(own / f"{KEYS[3]}.block", 12345, 12345)
    before = sorted(path.name for path in own.iterdir())
    cache = HostCache(str(cache_dir), 3 * (SIZE + 100))
    assert get(cache, list(range(20))) == 20
    get(cache, list(range(20)))
    left = {path.name for path in own.iterdir()}
    replaced = {f"{KEYS[i]}.block" for i in range(4)}
    assert set(before) - replaced <= left
    assert (outside / "treasure").read_bytes() == bytes(5000)
    assert not own.stat().st_mode & 0o022


@pytest.mark.parametrize("kind", ["link", "user", "file"])
def test_cache_folder_of_another_user_is_not_used(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    own = tmp_path / "cache" / "gatdist-blocks-1"
    own.parent.mkdir()
    if kind == "link":
        own.symlink_to(outside)
    elif kind == "file":
        own.write_bytes(b"")
    else:
        if os.geteuid() != 0:
            pytest.skip("only root may give a folder away")
        own.mkdir()
        os.chown(own, 12345, 12345)
    cache = HostCache(str(tmp_path / "cache"), 10**6)
    assert get(cache, [1, 2]) == 2
    assert get(cache, [1, 2]) == 0
    assert cache.notes == []
    assert list(outside.iterdir()) == []
    assert kind == "file" or list(own.iterdir()) == []


def test_deleted_cache_folder_is_created_again(tmp_path: Path) -> None:
    cache = HostCache(str(tmp_path), 10**6)
    get(cache, [1])
    sweep(tmp_path)
    shutil.rmtree(tmp_path / "gatdist-blocks-1")
    assert get(cache, [1, 2]) == 2
    sweep(tmp_path)
    get(cache, [1, 2])
    assert get(cache, [1, 2]) == 0
    assert cache.notes == []


def test_killed_cache_sweeper_is_replaced(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
from gatdist.data.reading import host_cache
host_cache.HostCache._files = lambda self, folder: print("sweeps", flush=True) or time.sleep(60)
host_cache.HostCache(sys.argv[1], 10**6)
time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        assert child.stdout.readline() == "sweeps\n"
        part = tmp_path / "gatdist-blocks-1" / PART
        part.write_bytes(b"torn")
        began = time.monotonic()
        cache = HostCache(str(tmp_path), 10**6)
        get(cache, [1])
        assert time.monotonic() - began < 5
        assert part.exists(), "there is one sweeper at a time"
    finally:
        child.kill()
        child.communicate()
    sweep(tmp_path)
    assert not part.exists()


STARTS = """
import threading
limit, go = int(sys.argv[2]), time.monotonic() + 0.5

def begin(seed):
    time.sleep(max(0, go - time.monotonic()))
    cache = HostCache(sys.argv[1], limit)
    for i in range(20):
        data = bytes([seed]) * 1000
        key = block_key("e" * 64, seed, i)
        assert cache.fetch([key], lambda numbers: [data]) == [data]
    for thread in threading.enumerate():
        if thread.name == "gatdist-cache-sweep":
            thread.join()
    return cache.notes

started = [start(begin, seed) for seed in range(8)]
print(json.dumps([json.load(pipe) for _, pipe in started]))
"""


def test_full_cache_with_many_blocks_starts(tmp_path: Path) -> None:
    """131,072 blocks, and 8 processes that start at once."""
    own = tmp_path / "gatdist-blocks-1"
    own.mkdir(mode=0o700)
    for i in range(131_072):
        (own / f"{i:040x}.block").write_bytes(b"x" * 100)
    limit = 131_072 * 100  # it is full
    assert json.loads(run_script(STARTS, tmp_path, str(limit))) == [[]] * 8
    sweep(tmp_path, limit)
    sizes = [path.stat().st_size for path in own.iterdir() if path.name.endswith(".block")]
    assert sum(sizes) <= limit
    assert len(sizes) > 100_000


def test_process_waiting_for_another_can_be_stopped(tmp_path: Path) -> None:
    cache = HostCache(str(tmp_path), 10**6)
    loading, go_on = threading.Event(), threading.Event()

    def hangs(numbers: list[int]) -> list[bytes]:
        loading.set()
        assert go_on.wait(30)
        return [content_of(5)]

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(cache.fetch, [KEYS[5]], hangs)
        assert loading.wait(10)
        assert cache.fetch([KEYS[5]], Loads(), stopped=lambda: True) == []
        go_on.set()
        assert first.result() == [content_of(5)]


def test_waiting_for_another_process_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatdist.data.reading.host_cache._PATIENCE_S", 0.05)
    cache = HostCache(str(tmp_path), 10**6)
    loading, go_on = threading.Event(), threading.Event()

    def hangs(numbers: list[int]) -> list[bytes]:
        loading.set()
        assert go_on.wait(30)
        return [content_of(5)]

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(cache.fetch, [KEYS[5]], hangs)
        assert loading.wait(10)
        assert get(cache, [5]) == 1
        go_on.set()
        assert first.result() == [content_of(5)]


def test_loading_error_is_raised_and_the_lock_released(tmp_path: Path) -> None:
    cache = HostCache(str(tmp_path), 10**6)

    def fails(numbers: list[int]) -> list[bytes]:
        raise StorageError("s3://bucket", "is gone")

    with refused(StorageError, "bucket"):
        cache.fetch([KEYS[1]], fails)
    assert get(cache, [1]) == 1


def test_invalid_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with refused(StorageError, "data.cache_dir"):
        HostCache(str(tmp_path / "file"), 10**6)


@pytest.fixture
def full_folder(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_reported_once_and_reading_continues(full_folder: Path) -> None:
    cache = HostCache(str(full_folder), 10**9)
    for i in range(60):  # a page for each block of 1,000 bytes: some fit
        assert get(cache, [i]) == 1
    assert len(cache.notes) == 1
    assert "No space left on device" in cache.notes[0]
    assert files(full_folder, ".part") == []
    kept = len(files(full_folder))
    assert kept > 5
    assert get(cache, list(range(60))) == 60 - kept
    (full_folder / "gatdist-blocks-1" / "filler").write_bytes(b"")
    again = HostCache(str(full_folder), 10**9)  # starts on a full disk
    assert get(again, list(range(60))) == 60 - kept


def test_folder_that_becomes_read_only(full_folder: Path) -> None:
    cache = HostCache(str(full_folder), 10**9)
    get(cache, [0])
    subprocess.run(["mount", "-o", "remount,ro", str(full_folder)], check=True)
    assert get(cache, [0, 1, 2]) == 2
    assert len(cache.notes) == 1
    assert "Read-only file system" in cache.notes[0]
    with refused(StorageError, "data.cache_dir"):
        HostCache(str(full_folder), 10**9)


def test_failed_write_is_reported_once(tmp_path: Path) -> None:
    """As on a full disk, for users who can't mount one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = HostCache(str(tmp_path), 10**9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        assert get(cache, [0, 1]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(cache.notes) == 1
    assert files(tmp_path) == files(tmp_path, ".part") == []
    assert get(cache, [0, 1]) == 2
