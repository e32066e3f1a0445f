"""Rejections by servers: what is named, what is retried, and what the doctor finds."""

from __future__ import annotations

from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from servers import Server

from benchmarks.proxy import Fault, Proxy
from gatdist.cluster.doctor import storage as doctor
from gatdist.common.errors import StorageError, StorageUnavailableError
from gatdist.storage import Store
from support import refused

pytestmark = pytest.mark.storage

SKEWED = "<Error><Code>RequestTimeTooSkewed</Code><Message>Too different.</Message></Error>"
DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
ALWAYS = (0, 10_000)


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    with Proxy(moto.address) as proxy:
        yield proxy


@pytest.fixture
def store(moto: Server, proxy: Proxy) -> Store:
    store = Store(f"{moto.new_bucket()}/run", moto.options(proxy.url), retry_budget_s=5)
    store.publish("x", b"1")
    return store


def test_request_rejected_for_a_skewed_clock_is_retried(store: Store, proxy: Proxy) -> None:
    for act in (
        lambda: store.read("x"),
        lambda: store.publish("y", b"2"),
        lambda: store.size("x"),
        lambda: store.list(),
        lambda: store.delete_files(["x"]),
    ):
        proxy.faults = [
            # As for HEAD, which has no body.
            Fault("refuse", methods=("HEAD",), status=403, headers={"Date": formatdate(0)}),
            Fault("refuse", methods=("GET", "PUT", "DELETE"), status=403, body=SKEWED),
        ]
        proxy.exchanges.clear()
        act()
        assert any(exchange.fault for exchange in proxy.exchanges)


def test_lasting_clock_skew_is_named(moto: Server, store: Store, proxy: Proxy) -> None:
    hurried = Store(store.url, moto.options(proxy.url), retry_budget_s=0.3)
    proxy.faults = [Fault("refuse", status=403, body=SKEWED, requests=ALWAYS)]
    with pytest.raises(StorageUnavailableError) as raised:
        hurried.read("x")
    assert raised.value.exit_status == 75


def test_403_for_missing_keys_without_list_permission_is_named(store: Store, proxy: Proxy) -> None:
    proxy.faults = [
        Fault("refuse", methods=("GET", "HEAD"), path="*absent", status=403, body=DENIED,
              requests=ALWAYS)
    ]  # fmt: skip
    assert store.read("x") == b"1"
    for act in (store.read, store.read_if_exists, store.exists, store.size):
        with refused(StorageError, "absent"):
            act("absent")


def test_s3_server_that_rejects_checksums_names_the_setting(store: Store, proxy: Proxy) -> None:
    body = (
        "<Error><Code>NotImplemented</Code><Message>Header x-amz-checksum-crc32</Message></Error>"
    )
    proxy.faults = [Fault("refuse", methods=("PUT",), status=501, body=body, requests=ALWAYS)]
    with refused(StorageError, "x"):
        store.publish("x", b"1")


# The doctor


def look(url: str, options: dict[str, Any]) -> doctor.StorageInfo:
    with doctor.marker(url, options) as marker:
        return doctor.look(marker)


# aiohttp warns about bodies above 1 MB, which it sends in pieces
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
@pytest.mark.parametrize("server", ["moto", "gcs", "azurite", "s3rver", "local", "memory"])
def test_doctor_does_all_that_a_run_does_and_deletes_exactly_that(
    server: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if server in ("local", "memory"):
        url, options = {"local": f"{tmp_path}/a::b", "memory": "memory://doctor/a*"}[server], {}
    else:
        found: Server = request.getfixturevalue(server)
        url, options = f"{found.new_bucket()}/a[1]", found.options(found.address)
    store = Store(url, options)
    mine = ["checkpoints/000000001.1-000000000000/MANIFEST.json", "doctor-notes", "probe"]
    for name in mine:
        store.publish(name, b"mine")
    info = look(url, options)
    assert info.error == ""
    assert ("conditional" in info.note) == (server in ("gcs", "s3rver"))
    assert list(store.find()) == mine


def test_doctor_passes_if_only_bulk_deletes_are_rejected(moto: Server, proxy: Proxy) -> None:
    url = moto.new_bucket()
    proxy.faults = [
        Fault("refuse", path="/bucket-*", methods=("POST",), status=400, requests=(0, 1))
    ]
    assert look(url, moto.options(proxy.url)).error == ""
    assert Store(url, moto.options(moto.address)).find() == {}


FAULTS = {
    "s3:ListBucket": [
        Fault("refuse", methods=("GET", "HEAD"), path="*/absent", status=403, body=DENIED,
              requests=ALWAYS),
    ],
    "listing": [
        Fault("refuse", path="/bucket-????????-????-????-????-????????????", status=403,
              body=DENIED, requests=ALWAYS)
    ],
    "delete": [Fault("refuse", methods=("DELETE",), status=403, body=DENIED, requests=ALWAYS)],
    "ranges": [Fault("ignore_range", requests=ALWAYS)],
    "second manifest": [
        Fault("refuse", methods=("PUT",), path="*/000000002.*/MANIFEST.json", status=403,
              body=DENIED, requests=ALWAYS)
    ],
    "conditional write": [
        Fault("refuse", methods=("PUT",), path="*/created", status=403, body=DENIED,
              requests=ALWAYS)
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_doctor_detects_what_would_end_a_run_and_cleans_up(
    moto: Server, proxy: Proxy, what: str
) -> None:
    url = moto.new_bucket()
    direct = Store(url, moto.options(moto.address))
    direct.publish("mine", b"1")
    proxy.faults = FAULTS[what]
    with doctor.marker(url, moto.options(moto.address)) as marker:
        info = doctor.look(marker._replace(options=moto.options(proxy.url)))
    assert info.error
    assert doctor.assess(info, url).ok is False
    if what == "s3:ListBucket":
        assert what in info.error
    if what != "delete":
        assert list(direct.find()) == ["mine"]
