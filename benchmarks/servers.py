"""S3 servers on loopback, each in its own process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

from gatdist.common.errors import UserError

_START_S = 30.0


@contextmanager
def moto(root: Path) -> Iterator[str]:
    """Serve Moto's S3 with an empty bucket of the folder's name; yields the address.

    Raises:
        UserError: It is not installed, or does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _server(command, port, "/moto-api/") as address:
        request = urllib.request.Request(f"{address}/{root.name}", method="PUT")
        urllib.request.urlopen(request).close()
        yield address


@contextmanager
def nginx(root: Path) -> Iterator[str]:
    """Serve the folder's files as a read-only bucket of its name; yields the address.

    Reading an S3 object is a GET of a file, with or without a range; nginx takes next to no CPU.

    Raises:
        UserError: It does not start.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        (own / "conf").write_text(
            # Workers started by root would run as a user who can't read the folder.
            f"{'user root;' * (os.geteuid() == 0)} daemon off; pid {own}/pid; events {{}} http {{ "
            + "".join(f"{kind}_temp_path {own}/temporary; " for kind in kinds)
            + f"access_log off; sendfile on; keepalive_requests 1000000; server {{ "
            f"listen 127.0.0.1:{port}; location /{root.name}/ {{ alias {root}/; }} }} }}"
        )
        program = nginx_program()
        assert program
        command = [program, "-e", f"{own}/errors", "-p", name, "-c", f"{own}/conf"]
        with _server(command, port) as address:
            yield address


def nginx_program() -> str | None:
    """Path of nginx, if it is installed."""
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _server(command: Sequence[str], port: int, path: str = "/") -> Iterator[str]:
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _START_S
            while not _answers(address + path):
                if process.poll() is not None or time.monotonic() > deadline:
                    rule = "is required, since no S3 server can be started"
                    hint = "Name a folder, such as s3://bucket/bench, or install moto[server]"
                    raise UserError("--url", rule, hint=hint)
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True
