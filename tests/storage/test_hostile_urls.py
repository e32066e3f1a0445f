"""Untrusted data names a server of its author; no command sends it a request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import OWN_TOKEN, POINTS, SECRET, spoil, train
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recorder import Recorder, recording

from gatdist.api import index, pack, verify
from gatdist.cli import main
from gatdist.common.errors import DataError, StorageError
from gatdist.config import load_config
from gatdist.data.dataset import open_dataset
from gatdist.storage import Store
from gatdist.storage.urls import OutsideUrl, origin
from support import refused

pytestmark = pytest.mark.storage


# Manifests

ELSEWHERE = (
    "{evil}/shards",
    "{evil}/${{env:PLANTED}}",
    "http://user:pw@{host}/x",
    "HTTP://{host}",
    "s3://strangers-bucket/x",
    "simplecache::{evil}/x",
    "file::{evil}/x",
    "zip://x::{evil}/x",
    "github://stranger:repo@main/x",
)


@pytest.mark.parametrize("named", ELSEWHERE)
def test_hostile_manifest_sends_no_secret(
    named: str, evil: Recorder, dataset: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    spoil(dataset, named.format(evil=evil.url, host=evil.url.removeprefix("http://")))
    for command in (
        [*train(dataset), "--run-dir", str(tmp_path / "run")],
        [*train(dataset), "--run-dir", str(tmp_path / "run"), "--dry-run"],
        ["verify", dataset, "--workers", "1"],
        ["verify", dataset, "--decode", "--workers", "1", "--set", f"key={OWN_TOKEN}"],
    ):
        assert "shards_url" in refused(*command)
    assert main(["inspect", str(dataset)]) == 0
    assert main(["inspect", str(dataset), "--json"]) == 0


def test_hostile_manifest_gets_no_header_of_the_owners_server(
    evil: Recorder, dataset: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """The data is on a server with the user's credentials; its manifest names another server."""
    options = f'data.storage_options={{headers={{Authorization="Bearer {OWN_TOKEN}"}}}}'
    for named in (f"{evil.url}/x", f"{evil.url}/${{env:PLANTED}}", str(dataset), "file:///etc"):
        spoil(dataset, named)
        with recording(dataset) as own:
            run = ["--run-dir", str(tmp_path / "run")]
            message = refused(*train(own.url, options), *run)
            assert "shards_url" in message
            message = refused("verify", own.url, "--workers", "1", "--set", 'headers.X="1"')
            assert "shards_url" in message


def test_shards_on_another_server_require_a_key_and_credentials_stay_with_their_origin(
    dataset: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    away = tmp_path / "index"
    away.mkdir()
    for path in (*dataset.glob("*.npy"), dataset / "manifest.json"):
        path.rename(away / path.name)
    run = ["--run-dir", str(tmp_path / "run")]
    with recording(dataset) as shards, recording(away) as own:
        spoil(away, shards.url)
        mine = f'data.storage_options={{headers={{X-Own="{OWN_TOKEN}"}}}}'
        message = refused(*train(own.url, mine), *run)
        assert f"{own.url}/manifest.json: shards_url = '{shards.url}': " in message
        assert "data.shards_url" in message
        assert not shards.requests
        theirs = 'data.shards_storage_options={headers={X-Shards="theirs"}}'
        assert main([*train(own.url, mine, f'data.shards_url="{shards.url}"', theirs), *run]) == 0
        options = {"headers": {"X-Own": OWN_TOKEN}}
        more = {"shards_url": shards.url, "shards_options": {"headers": {"X-Shards": "theirs"}}}
        assert verify(own.url, workers=1, options=options, **more)["whole"]
        assert shards.requests
        assert all(OWN_TOKEN not in str(request) for request in shards.requests)
        assert all("theirs" in str(request) for request in shards.requests)
        assert all("theirs" not in str(request) for request in own.requests)
    # On the same origin, the manifest may name another folder, which gets the credentials, too.
    with recording(tmp_path) as both:
        spoil(away, f"{both.url}/data")
        user = both.url.replace("//", f"//me:{OWN_TOKEN}@")
        assert verify(f"{user}/index?sig=1", workers=1)["whole"]
        tars = [request for request in both.requests if "/data/" in request[1]]
        assert tars
        assert all(path.endswith(".tar?sig=1") for _, path, _ in tars)
        assert all("Authorization" in headers for _, _, headers in tars)


def test_index_writes_no_secret_and_names_the_key_to_set(dataset: Path) -> None:
    (dataset / "manifest.json").unlink()
    for path in dataset.glob("*.npy"):
        path.unlink()
    outcome = index(str(dataset), "memory://hostile-index", workers=1)
    assert outcome["shards_url"] == str(dataset)
    config = load_config("ring", ["data.url=memory://hostile-index"]).data
    with refused(DataError, "manifest.json: shards_url"):
        open_dataset(config)
    allowed = config.model_copy(update={"shards_url": outcome["shards_url"]})
    assert open_dataset(allowed).num_samples == len(POINTS)


# Lists


def image(folder: Path, name: str = "a.png") -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / name)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("named", ELSEWHERE[:-1])
def test_hostile_list_sends_no_secret(
    kind: str, named: str, evil: Recorder, refused: Callable[..., str], tmp_path: Path
) -> None:
    url = named.format(evil=evil.url, host=evil.url.removeprefix("http://")) + "/a.png"
    image(tmp_path / "in")
    path = tmp_path / "in" / f"list.{kind}"
    rows = ["a.png", url]
    if kind == "parquet":
        table = pytest.importorskip("pyarrow").table({"url": rows})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    elif kind == "json":
        path.write_text(json.dumps([{"url": row} for row in rows]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"url": row}) for row in rows))
    else:
        path.write_text("\n".join(["url", *rows]))
    message = refused("pack", path, tmp_path / "out", "--workers", "1")
    assert str(path.parent) in message
    allowed = refused(
        *("pack", path, tmp_path / "out2", "--allow-origin", "https://another.example"),
        *("--source-option", f'headers={{Authorization="{OWN_TOKEN}"}}', "--dry-run"),
    )
    assert "another.example" not in allowed


def test_list_on_a_server_cannot_name_files_of_this_machine(
    evil: Recorder, refused: Callable[..., str], tmp_path: Path
) -> None:
    image(tmp_path / "in")
    for named in (f"{tmp_path}/in/a.png", f"file://{tmp_path}/in/a.png", f"{evil.url}/a.png"):
        (tmp_path / "in" / "list.csv").write_text(f"file\na.png\n{named}\n")
        with recording(tmp_path / "in") as own:
            message = refused("pack", f"{own.url}/list.csv", tmp_path / "out", "--workers", "1")
            assert f"{own.url}: " in message


def test_listed_origins_are_counted_and_allowed_without_credentials(tmp_path: Path) -> None:
    image(tmp_path / "in")
    with recording(tmp_path / "in") as own, recording(tmp_path / "in") as other:
        rows = [f"{own.url}/a.png?{i}" for i in range(3)]
        rows += [f"{other.url}/a.png?{i}" for i in range(2)]
        (tmp_path / "in" / "list.csv").write_text("\n".join(["url", *rows]))
        options = {"headers": {"X-Api-Key": OWN_TOKEN}}
        source, more = f"{own.url}/list.csv", {"workers": 1, "source_options": options}
        with refused(DataError, own.url) as error:
            pack(source, str(tmp_path / "no"), **more)
        assert f"{own.url} (" not in str(error.value)
        assert not other.requests
        outcome = pack(source, str(tmp_path / "out"), allowed_origins=[other.url], **more)
        assert outcome["samples"] == 5
        assert len(other.requests) >= 2
        assert all(OWN_TOKEN not in str(request) for request in other.requests)
        assert all(OWN_TOKEN in str(request) for request in own.requests)


def test_untrusted_labels_are_names_only(evil: Recorder, tmp_path: Path) -> None:
    image(tmp_path / "in")
    rows = ["file,label", "a.png,1", f"{evil.url}/${{env:PLANTED}}.png,2"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    outcome = pack(
        str(tmp_path / "in"), str(tmp_path / "out"), labels=str(tmp_path / "labels.csv"), workers=1
    )
    assert outcome["samples"] == 1


# Redirects


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key", "Cookie", "User-Agent"])
def test_redirect_to_another_origin_gets_no_credentials(header: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    with recording(tmp_path) as other:
        with recording(tmp_path, {"/x": f"{other.url}/x", "/y": "/z", "/z": "/x"}) as own:
            for options in (
                {"headers": {header: OWN_TOKEN}},
                {"client_kwargs": {"headers": {header: OWN_TOKEN}}},
            ):
                store = Store(f"{own.url}?sig={SECRET}", options)
                assert store.read("x") == b"0123456789"
                assert store.read_ranges([("y", 2, 4)]) == [b"23"]
            assert all(OWN_TOKEN in str(request) for request in own.requests)
        assert other.requests
        assert all(OWN_TOKEN not in str(request) for request in other.requests)
        assert all(SECRET not in str(request) for request in other.requests)
        assert any(headers.get("Range") == "bytes=2-3" for _, _, headers in other.requests)


def test_redirect_gets_no_password(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    with recording(tmp_path) as other, recording(tmp_path, {"/x": f"{other.url}/x"}) as own:
        store = Store(own.url.replace("//", f"//me:{OWN_TOKEN}@"))
        assert store.read("x") == b"0123456789"
        assert all("Authorization" in headers for _, _, headers in own.requests)
        assert all("Authorization" not in headers for _, _, headers in other.requests)


@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/x", "gopher://x/"])
def test_redirect_to_another_scheme_is_rejected(to: str, tmp_path: Path) -> None:
    with recording(tmp_path, {"/x": to}) as own, refused(StorageError, "x"):
        Store(own.url, retry_budget_s=0.2).read("x")


@pytest.mark.parametrize("to", ["/manifest.json", "http://[no", "//:0:0/"])
def test_broken_redirect_is_not_treated_as_a_missing_file(to: str) -> None:
    with recording(None, {"/manifest.json": to}) as own:
        store = Store(own.url, retry_budget_s=0.2)
        assert not store.exists("other")
        for read in (store.exists, store.read, lambda name: store.read_ranges([(name, 0, 3)])):
            with refused(StorageError, "manifest.json"):
                read("manifest.json")


def test_redirect_of_a_listed_file_gets_no_credentials(tmp_path: Path) -> None:
    image(tmp_path / "there")
    with (
        recording(tmp_path / "there") as last,
        recording(None, {"/a.png": f"{last.url}/a.png"}) as listed,
        recording(tmp_path) as own,
    ):
        (tmp_path / "list.csv").write_text(f"url\n{listed.url}/a.png\n")
        source = f"{own.url}/list.csv"
        more = {"workers": 1, "source_options": {"headers": {"X-Api-Key": OWN_TOKEN}}}
        with pytest.raises(DataError):
            pack(source, str(tmp_path / "no"), **more)
        assert not listed.requests
        outcome = pack(source, str(tmp_path / "out"), allowed_origins=[listed.url], **more)
        assert outcome["samples"] == 1
        assert last.requests
        assert OWN_TOKEN in str(own.requests)
        assert OWN_TOKEN not in str(listed.requests + last.requests)


# Names


@pytest.mark.parametrize("name", ["../x", "a/../../x", "http://h/x", "${env:PLANTED}", "s3://b/x"])
def test_hostile_folder_names_send_no_request(name: str, evil: Recorder) -> None:
    for url in (evil.url, "memory://hostile", "/tmp"):
        with pytest.raises(StorageError):
            Store(url).child(name)


@pytest.mark.parametrize("name", ["@{host}/x", "//{host}/x", "\\\\{host}\\x", "http://{host}/x"])
def test_hostile_file_names_stay_on_their_server(name: str, evil: Recorder, tmp_path: Path) -> None:
    host = evil.url.removeprefix("http://")
    with recording(tmp_path) as own, pytest.raises(StorageError):
        Store(own.url).read(name.format(host=host))


@given(st.text(max_size=30), st.sampled_from(["http://good:1", "https://good/x", "s3://good/x"]))
def test_untrusted_url_never_leads_to_another_origin(text: str, own: str) -> None:
    for url in (text, f"http://{text}", f"http://good:1{text}", f"s3://good{text}"):
        outside = OutsideUrl(url)
        if outside.origin == origin(own):
            assert origin(outside.on(own)) == origin(own)
