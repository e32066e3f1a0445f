"""Names are literal: no character in them is a pattern, a version, a query or a chain."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from servers import Server

from benchmarks.proxy import Proxy
from gatdist.cli import main
from gatdist.common.errors import StorageError
from gatdist.runs import Checkpoints, Retention
from gatdist.storage import Store

SERVERS = ["moto", "gcs", "azurite"]
PLACES = ["local", "file", "memory"]
PLACES += [pytest.param(server, marks=pytest.mark.storage) for server in SERVERS]
# Each pattern next to what it would match, or be mistaken for.
NAMES = [
    *("a1", "a[1]", "a*", "a?", "[!b]1", "a**", "{a1,a2}"),
    *(
        "c d",
        "c%20d",
        "c+d",
        "ä+ö",
        "100%",
        "%5B1%5D",
        "a1.",
        "..a1",
        "a&b=c",
        "~a",
        "$HOME",
        "a@b",
    ),
    *(unicodedata.normalize(form, "ü–é") for form in ("NFC", "NFD")),
]
# Some kinds of storage reject some of these; the others they store exactly.
AMBIGUOUS = ["a1#1234", "a1?versionId=x", "a1?versionid=x", "a1?generation=1", "a#b", "x?y#z"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    if request.param in SERVERS:
        server = request.getfixturevalue(request.param)
        return f"{server.new_bucket()}/runs", server.options(server.address)
    urls = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid4()}"}
    return urls[request.param], {}


def train(store: Store, attempt: int, *clocks: int) -> list[str]:
    """Commit checkpoints like an attempt of a run that keeps one; return the remaining folders."""
    checkpoints = Checkpoints(store.child("checkpoints"), Retention(newest=1))
    for clock in clocks:
        tensors = {"generator/w": torch.full((3,), float(clock))}
        checkpoints.save(clock, tensors, {"of": store.url}, attempt=attempt)
    checkpoints.close()
    return checkpoints.committed()


def test_runs_with_names_like_patterns_keep_their_own_checkpoints(
    place: tuple[str, dict[str, Any]],
) -> None:
    url, options = place
    kept = {name: train(Store(f"{url}/{name}", options), 1, 1) for name in NAMES}
    for name in NAMES:  # each prunes next to all the others
        kept[name] = train(Store(f"{url}/{name}", options), 2, 2, 3)
        assert len(kept[name]) == 1
    for name in NAMES:
        store = Store(f"{url}/{name}", options)
        newest = Checkpoints(store.child("checkpoints")).newest()
        assert newest is not None
        assert newest.state == {"of": store.url}
        assert Checkpoints(store.child("checkpoints")).committed() == kept[name]
    assert set(Store(url, options).list()) == set(NAMES)


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "**", "{a1,a2}"])
def test_deleting_a_name_like_a_pattern_deletes_nothing_else(
    place: tuple[str, dict[str, Any]], name: str
) -> None:
    store = Store(*place)
    others = ["a1/x", "a2/x", "aa", "b/a1", "x"]
    for other in others:
        store.publish(other, b"1")
    store.delete(name)
    store.delete_files([name, f"{name}/x"])
    assert list(store.find()) == others
    store.publish(f"{name}/x", b"1")
    store.publish(f"{name}/y", b"1")
    store.delete_files([f"{name}/x"])
    assert f"{name}/y" in store.find()
    store.delete(name)
    assert list(store.find()) == others


def test_names_like_versions_and_queries_are_exact_or_rejected(
    place: tuple[str, dict[str, Any]],
) -> None:
    url, options = place
    Store(f"{url}/a1", options).publish("x", b"a1")
    for name in AMBIGUOUS:
        try:
            store = Store(f"{url}/{name}", options)
            store.publish("x", name.encode())
        except StorageError:
            assert "://" in url, "this machine holds every name"
            continue
        assert store.read("x") == name.encode()
        assert list(store.find()) == ["x"]
        assert name in Store(url, options).list()
        store.delete("x")
        assert store.list() == []
    assert Store(f"{url}/a1", options).read("x") == b"a1"


@pytest.mark.parametrize("name", ["a::b", "a#b", "c%20d", "a?b", "file:x", "x::s3", "~", "::"])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_local_paths_are_not_parsed_as_urls_or_chains(
    tmp_path: Path, name: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"{prefix}{tmp_path}/{name}")
    store.publish("x", b"1")
    store.child("s::t").publish("y", b"2")
    assert (tmp_path / name / "x").read_bytes() == b"1"
    assert (tmp_path / name / "s::t" / "y").read_bytes() == b"2"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert set(store.find()) == {"x", "s::t/y"}
    if not prefix and name != "~":
        monkeypatch.chdir(tmp_path)
        assert Store(name).read("x") == b"1"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a::b",
        "memory://a::b",
        "az://bucket/x::",
        "simplecache::s3://bucket/x",
        "zip://x.zip::http://h.invalid/y",
        "http://h.invalid/a::file:///etc/passwd",
        "http://h.invalid::file/etc/passwd",
    ],
)
def test_chained_url_is_rejected_when_it_is_opened(url: str) -> None:
    with pytest.raises(StorageError) as raised:
        Store(url)
    assert raised.value.exit_status == 2


def test_ipv6_address_is_not_a_chain() -> None:
    assert Store("http://[::1]:8000/x").url == "http://[::1]:8000/x"


@pytest.mark.storage
def test_pruning_lists_once_and_never_deletes_what_it_did_not_write(moto: Server) -> None:
    store = Store(f"{moto.new_bucket()}/run", moto.options(moto.address))
    notes = ["checkpoints/notes.txt", "checkpoints/000000001.1-abc/notes.txt"]
    notes += ["checkpoints/000000001/mine.bin", "checkpoints/000000001/deep/state.json"]
    for note in notes:
        store.publish(note, b"keep me")
    store.publish("checkpoints/000000001/state.json", b"never committed")
    checkpoints = Checkpoints(store.child("checkpoints"), Retention(newest=1))
    checkpoints.save(2, {"generator/w": torch.ones(3)}, {}, attempt=1)
    checkpoints.wait()
    (folder,) = [name for name in checkpoints.committed() if name.startswith("000000002")]
    notes.append(f"checkpoints/{folder}/notes.safetensors")
    store.publish(notes[-1], b"keep me, too: no manifest lists me")
    checkpoints.close()
    with Proxy(moto.address) as proxy:
        watched = Store(f"{store.url}/checkpoints", moto.options(proxy.url))
        again = Checkpoints(watched, Retention(newest=1))
        again.save(3, {"generator/w": torch.ones(3)}, {}, attempt=2)
        again.close()
        again.store = store.child("checkpoints")
        lists = [e for e in proxy.exchanges if e.method == "GET" and e.path.count("/") < 3]
        assert len(lists) == 1
    (newest,) = again.committed()
    assert newest.startswith("000000003.2-")
    left = [name for name in store.find() if not name.startswith(f"checkpoints/{newest}/")]
    assert left == sorted(notes)


TINY = ["run.total_samples=64", "run.global_batch=16", "run.checkpoint_every_samples=16"]
TINY += ["run.keep_checkpoints=1", "evaluate.metrics=[]", "monitor.tensorboard=false"]
TINY += [f'model.{p}={{name="residual", width=4}}' for p in ("generator", "discriminator")]


@pytest.mark.parametrize("where", ["memory", "local"])
def test_training_next_to_a_run_whose_name_a_pattern_or_chain_matches(
    tmp_path: Path, where: str
) -> None:
    base = f"memory://{uuid4()}" if where == "memory" else str(tmp_path)
    names = ["a1", "a[1]"] if where == "memory" else ["a", "a::b"]
    sets = [word for setting in TINY for word in ("--set", setting)]
    for name in [*names, *names]:
        assert main(["train", "digits", "--local", "--run-dir", f"{base}/{name}", *sets]) == 0
        folder = Store(f"{base}/{name}").child("checkpoints")
        (only,) = Checkpoints(folder).committed()
        assert only.startswith("000000064.1-")
    assert len(Store(base).list()) == 2


def test_nothing_is_deleted_in_a_folder_behind_a_link(tmp_path: Path) -> None:
    """A checkpoint of another run, linked into this one."""
    theirs = Store(str(tmp_path / "theirs"))
    (name,) = train(theirs, 1, 1)
    run = tmp_path / "own"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "000000001.1-000000000001").symlink_to(
        tmp_path / "theirs" / "checkpoints" / name
    )
    checkpoints = Checkpoints(Store(str(run / "checkpoints")), Retention(newest=1))
    checkpoints.save(5, {"generator/w": torch.ones(3)}, {}, attempt=2)
    checkpoints.close()
    assert Checkpoints(theirs.child("checkpoints")).newest() is not None
