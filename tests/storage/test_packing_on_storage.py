"""Packing from and to an object store, with and without faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from servers import Server

import gatdist
from benchmarks.proxy import Fault, Proxy
from gatdist.cli import main
from gatdist.common.errors import StorageError
from gatdist.storage import Store
from packing import content, image, pack, write
from support import refused

pytestmark = pytest.mark.storage

FILES = {f"{'ab'[i % 2]}/{i}.png": image(i, (9, 9)) for i in range(30)}


@pytest.fixture
def bucket(moto: Server) -> str:
    """Return the URL of a bucket with images in the folder ``in``."""
    url = moto.new_bucket()
    store = Store(url, moto.options(moto.address))
    for name, data in FILES.items():
        store.publish(f"in/{name}", data)
    return url


def from_bucket(bucket: str, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return gatdist.pack(
        f"{bucket}/in",
        f"{bucket}/out",
        shard_bytes=9_000,
        source_options=options,
        dest_options=options,
        **{"size": 6, "workers": 1} | more,
    )


def fetched(bucket: str, options: dict[str, Any], folder: Path) -> dict[str, str]:
    store = Store(bucket, options)
    files = {name.removeprefix("out/"): store.read(name) for name in store.find("out")}
    return shards(content(write(folder, files)))


def shards(found: dict[str, str]) -> dict[str, str]:
    """Return all files except the plan, which names the source."""
    return {name: digest for name, digest in found.items() if not name.endswith("plan.json")}


def test_faults_change_no_byte(moto: Server, bucket: str, tmp_path: Path) -> None:
    pack(write(tmp_path / "in", FILES), tmp_path / "local", size=6)
    faults = [
        Fault("refuse", "*/in/a/*"),
        Fault("reset", "*/in/b/*"),
        Fault("refuse", "*.tar", methods=("PUT",)),
    ]
    with Proxy(moto.address, faults=faults) as proxy:
        outcome = from_bucket(bucket, moto.options(proxy.url))
        assert sum(bool(exchange.fault) for exchange in proxy.exchanges) > 30
    assert (outcome["samples"], outcome["skipped"]) == (30, 0)
    local = shards(content(tmp_path / "local"))
    assert len(local) > 8
    assert fetched(bucket, moto.options(moto.address), tmp_path / "bucket") == local


def test_storage_options_of_the_command_line_are_used(
    moto: Server, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_SECRET", "test")
    words = [
        "key=test",
        "secret='${env:MY_SECRET}'",
        f"client_kwargs.endpoint_url='{moto.address}'",
    ]
    sets = [word for text in words for word in ("--source-option", text, "--dest-option", text)]
    command = ["pack", f"{bucket}/in", f"{bucket}/out", "--workers", "1", "--json"]
    assert main([*command, *sets]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 30
    assert main([*command, "--source-option", "anon"]) == 2
    assert "gatdist: --source-option = 'anon': " in capsys.readouterr().err


def test_denied_access_is_not_reported_as_bad_samples(
    moto: Server, bucket: str, tmp_path: Path
) -> None:
    """Credentials that expire during the run must not skip all later samples."""
    pack(write(tmp_path / "in", FILES), tmp_path / "local", size=6)
    denied = Fault("refuse", "*/in/a/2*", requests=(1, 10**6), status=403)
    with Proxy(moto.address, faults=[denied]) as proxy:
        options = moto.options(proxy.url)
        with refused(StorageError, "24.png"):
            from_bucket(bucket, options)
        assert not Store(bucket, options).exists("out/manifest.json")
        proxy.faults = ()
        assert from_bucket(bucket, options, workers=2)["skipped"] == 0
    local = shards(content(tmp_path / "local"))
    assert fetched(bucket, moto.options(moto.address), tmp_path / "bucket") == local
