"""S3 server on loopback for the benchmark of storage."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

_START_S = 30.0


@contextmanager
def nginx(root: Path) -> Iterator[str]:
    """Serve the folder as a read-only S3 bucket of its name; yields the address."""
    program = nginx_program()
    if program is None:
        raise SystemExit("nginx is not installed (make setup-system); or give --url")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
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
        process = subprocess.Popen([program, "-e", f"{own}/errors", "-p", name, "-c", own / "conf"])
        try:
            deadline = time.monotonic() + _START_S
            while not _answers(f"http://127.0.0.1:{port}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("nginx does not start")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def nginx_program() -> str | None:
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True
