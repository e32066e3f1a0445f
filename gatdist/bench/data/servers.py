"""Servers of S3 objects on this machine, each in a process of its own."""

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
    """Moto's S3 in a process of its own, with an empty bucket of the folder's name; its address.

    Raises:
        UserError: it is not installed, or does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _server(command, port, "/moto-api/") as address:
        request = urllib.request.Request(f"{address}/{root.name}", method="PUT")
        urllib.request.urlopen(request).close()
        yield address


@contextmanager
def nginx(root: Path) -> Iterator[str]:
    """What is in the folder, as a bucket of its name that can only be read; the address.

    To read an object is to ask for a file, with or without a range: nginx needs to know no more of
    S3 than that, and what it takes of this machine's time is hardly to be seen.

    Raises:
        UserError: it does not start.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        (own / "conf").write_text(
            # Where root runs it, its workers would be of a user who may not read the folder.
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
    """Where nginx is, if it is; Debian keeps it where only root looks."""
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _server(command: Sequence[str], port: int, path: str = "/") -> Iterator[str]:
    """A server in a process of its own, once it answers at ``path``; its address."""
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _START_S
            while not _answers(address + path):
                if process.poll() is not None or time.monotonic() > deadline:
                    rule = "there is no S3 server to start"
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
