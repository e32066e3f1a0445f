"""Real servers of every kind of storage, each a process on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen
from uuid import uuid4

import fsspec

from support import free_port, need, wait_until

AZURE_ACCOUNT = "tester"


@dataclass(frozen=True)
class Server:
    """A running object store.

    Args:
        protocol: Protocol of its URLs.
        address: http://HOST:PORT.
        options: Storage options for the server at an address, which may be that of a proxy.
    """

    protocol: str
    address: str
    options: Callable[[str], dict[str, Any]]

    def new_bucket(self) -> str:
        """Return the URL of a new, empty bucket."""
        name = f"bucket-{uuid4()}"
        self.file_system().mkdir(name)
        return f"{self.protocol}://{name}"

    def file_system(self) -> Any:
        """Return an fsspec file system, to create and remove buckets, unlike a ``Store``."""
        return fsspec.filesystem(
            self.protocol, use_listings_cache=False, **self.options(self.address)
        )


@contextmanager
def process(
    command: Sequence[str | Path], address: str, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Yield once the server answers at ``address``; its output is in ``folder/log``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | dict(env or {}),
            start_new_session=True,
        )

    def answers() -> bool:
        assert server.poll() is None, (folder / "log").read_text()
        try:
            with urlopen(address, timeout=5):
                return True
        except HTTPError:
            return True
        except OSError:
            return False

    try:
        wait_until(answers, f"{command[0]} to answer", timeout_s=300)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """S3 by moto, with any key and secret."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with process(command, f"{address}/moto-api/", folder):
        yield Server("s3", address, lambda at: s3_options(at, "test"))


@contextmanager
def s3rver(folder: Path) -> Iterator[Server]:
    """S3 by s3rver, which checks signatures."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    (program,) = need("s3rver")
    command = [program, "-d", folder / "data", "-a", "127.0.0.1", "-p", str(port), "--silent"]
    (folder / "data").mkdir()
    with process(command, address, folder):
        yield Server("s3", address, lambda at: s3_options(at, "S3RVER"))


def s3_options(address: str, key: str) -> dict[str, Any]:
    return {"key": key, "secret": key, "client_kwargs": {"endpoint_url": address}}


@contextmanager
def gcs(folder: Path) -> Iterator[Server]:
    """Google Cloud Storage by gcp-storage-emulator, which checks no credentials."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).parent / "gcp-storage-emulator"
    command = [program, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    with process([*command, "--quiet"], address, folder):
        yield Server("gs", address, lambda at: {"endpoint_url": at, "token": "anon"})


@contextmanager
def azurite(folder: Path) -> Iterator[Server]:
    """Azure Blob Storage by azurite, which checks signatures."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    (program,) = need("azurite-blob")
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    key = b64encode(os.urandom(32)).decode()
    with process(
        [*command, "--skipApiVersionCheck", "--silent", "--disableTelemetry"],
        f"{address}/{AZURE_ACCOUNT}",
        folder,
        {"AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{key}"},
    ):
        yield Server("az", address, lambda at: azure_options(at, key))


def azure_options(address: str, key: str) -> dict[str, Any]:
    parts = {
        "DefaultEndpointsProtocol": "http",
        "AccountName": AZURE_ACCOUNT,
        "AccountKey": key,
        "BlobEndpoint": f"{address}/{AZURE_ACCOUNT}",
    }
    return {"connection_string": ";".join(f"{name}={value}" for name, value in parts.items())}


NGINX = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/errors;
events {{ worker_connections 128; }}
http {{
    access_log off;
    default_type application/octet-stream;
    {temporary}
    server {{
        listen 127.0.0.1:{port};
        root {folder}/data;
        location / {{ autoindex on; }}
        location /unlisted/ {{ autoindex off; }}
        location /forbidden/ {{ deny all; }}
        location /private/ {{ auth_basic "private"; auth_basic_user_file {folder}/users; }}
        location /whole/ {{ max_ranges 0; }}
        location /signed/ {{ if ($arg_sig != "s3cr3t") {{ return 403; }} }}
    }}
}}
"""
NGINX_USER = ("reader", "s3cr3t")


@contextmanager
def nginx(folder: Path) -> Iterator[tuple[str, Path]]:
    """HTTP: yield the address and the served folder.

    Of its folders, ``unlisted`` has no listing, ``forbidden`` denies access, ``private`` requires
    ``NGINX_USER``, ``signed`` requires ``?sig=s3cr3t``, and ``whole`` ignores ranges and always
    sends whole files.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    (program,) = need("nginx")
    for name in ("data/unlisted", "data/forbidden", "data/private", "data/whole"):
        (folder / name).mkdir(parents=True)
    user, password = NGINX_USER
    (folder / "users").write_text(f"{user}:{{PLAIN}}{password}\n")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/temporary;" for kind in kinds)
    settings = folder / "nginx.conf"
    settings.write_text(NGINX.format(folder=folder, port=port, temporary=temporary))
    # If root starts it, its workers would run as a user who can't read the folder.
    run = "user root; " if os.geteuid() == 0 else ""
    command = [program, "-e", folder / "errors", "-p", folder, "-c", settings]
    with process([*command, *(["-g", run] if run else [])], address, folder):
        yield address, folder / "data"
