"""The workers of a host send their heartbeats together, whichever of them ends or hangs."""

import errno
import fcntl
import json
import os
import time

import pytest

from gatdist.cluster import relay
from gatdist.cluster.relay import Relay, shared_folder

ORDERS = {"stop": False, "interval_s": 0.5, "lost": []}


class Driver:
    """Takes note of the messages with heartbeats: of which workers, and who sent them."""

    def __init__(self):
        self.messages = []

    def relay(self, folder, worker):
        def send(beats):
            self.messages.append((worker, sorted(beat["actor"] for beat in beats)))
            return ORDERS | {"number": len(self.messages)}

        return Relay(folder, worker, send)


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def beat(one, worker):
    return one.exchange({"actor": worker, "node": "n"})


def test_one_message_has_the_heartbeats_of_all(driver, folder):
    a, b, c = (driver.relay(folder, name) for name in "abc")
    assert beat(a, "a")["number"] == 1
    assert beat(b, "b")["number"] == beat(c, "c")["number"] == 1  # as a has written
    assert beat(a, "a")["number"] == 2
    assert driver.messages == [("a", ["a"]), ("a", ["a", "b", "c"])]
    assert beat(a, "a")["number"] == 3  # without those that have sent nothing since
    assert driver.messages[-1] == ("a", ["a"])


def test_another_takes_over_when_the_sender_ends(driver, folder):
    a, b = driver.relay(folder, "a"), driver.relay(folder, "b")
    beat(a, "a")
    beat(b, "b")
    a.close()  # as the end of its process does
    beat(b, "b")
    assert driver.messages == [("a", ["a"]), ("b", ["b"])]
    b.close()
    assert not folder.exists()


@pytest.mark.parametrize("last", ["a", "b"])
def test_the_last_one_deletes_the_folder_whether_it_was_the_sender(last, driver, folder):
    both = {name: driver.relay(folder, name) for name in "ab"}
    for name, one in both.items():
        beat(one, name)
    both.pop("ab".replace(last, "")).close()
    assert folder.exists()
    both[last].close()
    assert not folder.exists()


def test_a_worker_that_cannot_lock_sends_its_own(driver, folder, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    one = driver.relay(folder, "a")
    beat(one, "a")
    before = len(os.listdir("/proc/self/fd"))
    assert [beat(one, "a")["number"] for _ in range(20)][-1] == 21
    assert len(os.listdir("/proc/self/fd")) == before


def test_workers_send_their_own_while_the_sender_hangs(driver, folder, monkeypatch):
    a, b = driver.relay(folder, "a"), driver.relay(folder, "b")
    beat(a, "a")
    assert beat(b, "b")["number"] == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1.6)
    assert beat(b, "b")["number"] == 2
    assert driver.messages == [("a", ["a"]), ("b", ["b"])]


def test_heartbeats_say_how_old_they_are(folder, monkeypatch):
    sent = []
    a = Relay(folder, "a", lambda beats: sent.extend(beats) or ORDERS)
    b = Relay(folder, "b", lambda beats: ORDERS)
    beat(a, "a")
    beat(b, "b")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 0.4)
    beat(a, "a")
    ages = {one["actor"]: one["age_s"] for one in sent[1:]}
    assert ages["a"] == 0.0
    assert 0.4 <= ages["b"] < 0.5


def test_what_ended_workers_have_left_is_deleted(driver, folder):
    (folder / "old.heartbeat").write_text(json.dumps({"actor": "old", "at": -100.0}))
    beat(driver.relay(folder, "a"), "a")
    assert driver.messages == [("a", ["a"])]
    assert not (folder / "old.heartbeat").exists()


@pytest.mark.parametrize("missing", [True, False])
def test_a_worker_without_a_folder_sends_its_own(missing, driver, tmp_path):
    one = driver.relay(None if missing else tmp_path / "deleted", "a")
    assert [beat(one, "a")["number"] for _ in range(2)] == [1, 2]
    one.close()


def test_nobody_else_can_write_to_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(relay, "_MEMORY", tmp_path)
    folder = shared_folder("x")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert shared_folder("x") == folder
    folder.chmod(0o777)
    assert shared_folder("x") is None
    (tmp_path / f"gatdist-{os.geteuid()}-y").symlink_to(tmp_path)
    assert shared_folder("y") is None


def test_folders_that_nobody_uses_are_deleted_after_a_day(monkeypatch, tmp_path):
    monkeypatch.setattr(relay, "_MEMORY", tmp_path)
    old, used = shared_folder("old"), shared_folder("used")
    (old / "a.heartbeat").write_text("{}")
    another = tmp_path / "gatdist-of-another"
    another.mkdir()
    two_days_ago = time.time() - 2 * 86400
    for one in (old, another):
        os.utime(one, (two_days_ago, two_days_ago))
    shared_folder("new")
    assert used.exists()
    assert another.exists()
    assert not old.exists()
