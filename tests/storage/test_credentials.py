"""Wrong keys, missing permissions and expired tokens, and their error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import pytest
from servers import Server, azure_options, s3_options

from benchmarks.proxy import Fault, Proxy
from gatdist.common.errors import StorageError
from gatdist.storage import Store
from support import refused

pytestmark = pytest.mark.storage

CONTENT = b"0123456789"
ALWAYS = (0, 1_000_000)


def messages_of_denials(store: Store) -> str:
    """Return the errors of reading, listing and writing, each of which must be denied."""
    messages = []
    for act in (
        lambda: store.read("x"),
        lambda: store.read_ranges([("x", 0, 2)]),
        lambda: store.exists("x"),
        store.list,
        lambda: store.publish("x", b"1"),
    ):
        with refused(StorageError) as error:
            act()
        messages.append(str(error.value))
    return "\n".join(messages)


def test_unknown_s3_key_is_denied(s3rver: Server) -> None:
    bucket = s3rver.new_bucket()
    Store(bucket, s3rver.options(s3rver.address)).publish("x", CONTENT)
    message = messages_of_denials(Store(bucket, s3_options(s3rver.address, "nobody-knows-me")))
    assert "AWS_ACCESS_KEY_ID" in message
    assert "InvalidAccessKeyId" in message
    assert "nobody-knows-me" not in message


@pytest.fixture
def checking(moto: Server) -> Iterator[Callable[[], None]]:
    """``checking()``: make moto check signatures and permissions until the test ends."""

    def free_actions(number: str) -> None:
        headers = {"Content-Type": "text/plain"}
        url = f"{moto.address}/moto-api/reset-auth"
        urlopen(Request(url, data=number.encode(), headers=headers, method="POST")).close()

    yield partial(free_actions, "0")
    free_actions("inf")


def test_wrong_s3_secret_and_missing_permissions_are_denied(
    moto: Server, checking: Callable[[], None]
) -> None:
    bucket = moto.new_bucket()
    Store(bucket, moto.options(moto.address)).publish("x", CONTENT)
    iam = boto3.client(
        "iam",
        endpoint_url=moto.address,
        region_name="us-east-1",
        aws_access_key_id="admin",
        aws_secret_access_key="admin",
    )
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    options = {
        "key": key["AccessKeyId"],
        "secret": key["SecretAccessKey"],
        "client_kwargs": {"endpoint_url": moto.address},
    }
    checking()
    assert "AccessDenied" in messages_of_denials(Store(bucket, options))
    message = messages_of_denials(Store(bucket, options | {"secret": "wr0ng-secret"}))
    assert "SignatureDoesNotMatch" in message
    assert "wr0ng-secret" not in message


def test_wrong_azure_key_is_denied(azurite: Server) -> None:
    bucket = azurite.new_bucket()
    Store(bucket, azurite.options(azurite.address)).publish("x", CONTENT)
    key = b64encode(b"wr0ng-key-wr0ng-key-wr0ng-key-32").decode()
    message = messages_of_denials(Store(bucket, azure_options(azurite.address, key)))
    assert "AZURE_STORAGE_CONNECTION_STRING" in message
    assert key not in message


def test_missing_gcs_permissions_are_denied(gcs: Server) -> None:
    """The emulator checks no permissions, so the proxy answers like Google."""
    with Proxy(gcs.address) as proxy:
        store = Store(gcs.new_bucket(), gcs.options(proxy.url))
        store.publish("x", CONTENT)
        reason = "Anonymous caller does not have storage.objects.get access to the object"
        body = json.dumps({"error": {"code": 403, "message": f"{reason}."}})
        everything = ("GET", "POST", "PUT", "HEAD")
        proxy.faults = [Fault("refuse", status=403, body=body, methods=everything, requests=ALWAYS)]
        assert f"(403 {reason})" in messages_of_denials(store)


# Expired tokens


S3_EXPIRED = (
    "<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>Expired.</Message></Error>"
)
AZURE_EXPIRED = (
    "<?xml version='1.0'?><Error><Code>AuthenticationFailed</Code>"
    "<Message>Signature not valid in the specified time frame.</Message></Error>"
)
EXPIRED: dict[str, dict[str, Any]] = {
    "moto": {"status": 400, "body": S3_EXPIRED},
    "gcs": {"status": 401, "body": '{"error": {"code": 401, "message": "Invalid Credentials"}}'},
    "azurite": {
        "status": 403,
        "body": AZURE_EXPIRED,
        "headers": {"x-ms-error-code": "AuthenticationFailed"},
    },
    "nginx": {"status": 401},
}
METHODS = ("GET", "HEAD", "PUT", "POST")


@pytest.fixture(params=EXPIRED)
def expiring(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Proxy, Store, dict[str, Any]]]:
    """Yield a proxy, a store behind it, and how its server rejects an expired token."""
    server = request.getfixturevalue(request.param)
    is_bucket = isinstance(server, Server)
    with Proxy(server.address if is_bucket else server[0]) as proxy:
        if is_bucket:
            store = Store(server.new_bucket(), server.options(proxy.url))
            store.publish("x", CONTENT)
        else:
            (server[1] / "x").write_bytes(CONTENT)
            store = Store(proxy.url)
        yield proxy, store, EXPIRED[request.param]


def test_expired_token_is_renewed_once_per_operation(
    expiring: tuple[Proxy, Store, dict[str, Any]],
) -> None:
    proxy, store, expired = expiring
    for act, expected in (
        (lambda: store.read_ranges([("x", 2, 4), ("x", 0, 10)]), [b"23", CONTENT]),
        (lambda: store.read("x"), CONTENT),
    ):
        proxy.faults = [Fault("refuse", **expired, methods=METHODS)]
        before = store._connection._file_system
        assert act() == expected
        assert store._connection._file_system is not before


def test_expired_s3_token_in_an_answer_without_body_is_renewed(moto: Server) -> None:
    with Proxy(moto.address) as proxy:
        store = Store(moto.new_bucket(), moto.options(proxy.url))
        store.publish("x", CONTENT)
        proxy.faults = [Fault("refuse", status=400, methods=["HEAD"])]
        assert store.size("x") == 10
        assert [exchange.status for exchange in proxy.exchanges[-2:]] == [400, 200]


def test_second_denial_raises(expiring: tuple[Proxy, Store, dict[str, Any]]) -> None:
    proxy, store, expired = expiring
    proxy.faults = [Fault("refuse", **expired, methods=METHODS, requests=ALWAYS)]
    proxy.exchanges.clear()
    with refused(StorageError, "x"):
        store.read_ranges([("x", 0, 2)])
    assert [exchange.status for exchange in proxy.exchanges] == [expired["status"]] * 2


ROTATE = """
import sys
from pathlib import Path
from gatdist.storage import Store

store = Store(sys.argv[1], {"client_kwargs": {"endpoint_url": sys.argv[2]}})
assert store.read("x") == b"0123456789"
credentials = Path(sys.argv[3])
credentials.write_text(credentials.read_text().replace("old", "new"))
assert store.read_ranges([("x", 2, 4)]) == [b"23"]  # the old key has expired meanwhile
assert Store(sys.argv[1], {"client_kwargs": {"endpoint_url": sys.argv[2]}}).read("x")
"""


def test_credentials_are_reloaded(moto: Server, tmp_path: Path) -> None:
    """As on a cluster, where another program updates a file of credentials from time to time."""
    bucket = moto.new_bucket()
    Store(bucket, moto.options(moto.address)).publish("x", CONTENT)
    credentials = tmp_path / "credentials"
    credentials.write_text(
        "[default]\naws_access_key_id = old-key\naws_secret_access_key = old-secret\n"
    )
    with Proxy(moto.address) as proxy:
        # Requests signed with the old key are denied from the second range on.
        proxy.faults = [
            Fault(
                "refuse", **EXPIRED["moto"], holding="Credential=old-key", requests=(1, ALWAYS[1])
            )
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        environment["AWS_SHARED_CREDENTIALS_FILE"] = str(credentials)
        subprocess.run(
            [sys.executable, "-c", ROTATE, bucket, proxy.url, str(credentials)],
            env=environment,
            check=True,
            timeout=300,
        )
        assert sum(bool(exchange.fault) for exchange in proxy.exchanges) == 1


def test_environment_reference_is_read_again(
    nginx: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, root = nginx
    (root / "private").mkdir(exist_ok=True)
    (root / "private" / "y").write_bytes(CONTENT)
    host = address.removeprefix("http://")
    monkeypatch.setenv("GATDIST_TEST_PASSWORD", "0ld-passw0rd")
    store = Store(f"http://reader:${{env:GATDIST_TEST_PASSWORD}}@{host}/private")
    assert store.url == f"http://reader:${{env:GATDIST_TEST_PASSWORD}}@{host}/private"
    with refused(StorageError, "private/y") as error:
        store.read("y")
    assert "(401" in str(error.value)
    assert "0ld-passw0rd" not in str(error.value)
    monkeypatch.setenv("GATDIST_TEST_PASSWORD", "s3cr3t")
    assert store.read("y") == CONTENT


@pytest.mark.parametrize("protocol", ["s3", "gs", "az", "http"])
def test_missing_package_is_named(protocol: str) -> None:
    package, extra = {
        "s3": ("s3fs", "s3"),
        "gs": ("gcsfs", "gcs"),
        "az": ("adlfs", "azure"),
        "http": ("aiohttp", "http"),
    }[protocol]
    program = f"""
import sys
sys.modules[{package!r}] = None  # as if it were not installed
from gatdist.common.errors import StorageError
from gatdist.storage import Store
try:
    Store("{protocol}://bucket/x")
except StorageError as error:
    print(error.subject, error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert ended.stdout.startswith(f"{protocol}://bucket/x ")
    assert f"gatdist[{extra}]" in ended.stdout
