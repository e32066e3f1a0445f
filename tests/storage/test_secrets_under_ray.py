"""Secrets are given to a run under Ray, and searched in everything that Ray stores."""

from __future__ import annotations

import base64
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import quote

import pytest
from servers import Server

from gatdist.data.builtin import write_digits
from gatdist.storage import Store
from support import ray_head

pytestmark = [pytest.mark.storage, pytest.mark.cluster]

# By reference to the environment; and written out, against the documentation.
REFERRED = {
    "PLANTED_KEY": "AKIAPLANTED7001",
    "PLANTED_SECRET": "planted-secret-7002",
    "PLANTED_HEADER": "planted-header-7003",
    "PLANTED_SIGNATURE": "s3cr3t",  # which nginx requires
    "PLANTED_HUB": "planted-hub-7004",
}
LITERAL = {"cookie": "planted-cookie-7005", "query": "planted-query-7006"}
VISIBLE = "planted-but-visible-7007"  # documented: Ray's own
PLUGIN = """
import os, pathlib
seen = {name: os.environ.get(name, "") for name in ("HUB_TOKEN", "PLAIN")}
if "SEEN" in os.environ:
    pathlib.Path(os.environ["SEEN"], str(os.getpid())).write_text(repr(seen))
"""
SMALL = [
    *("run.total_samples=64", "run.global_batch=16", "run.log_every_samples=32"),
    *("run.checkpoint_every_samples=32", 'model.generator={name="residual", width=4}'),
    'model.discriminator={name="residual", width=4}',
    'evaluate={metrics=["swd"], features="points", num_samples=64}',
]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's temporary folder. Its sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def head(ray_folder: Path, tmp_path: Path) -> Iterator[str]:
    options = ("--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={ray_folder}")
    with ray_head(tmp_path, *options, env={"RAY_AUTH_MODE": "disabled"}) as address:
        yield address


def found_in(content: bytes) -> list[str]:
    return [
        secret
        for secret in [*REFERRED.values(), *LITERAL.values()]
        for form in (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode())
        if form.encode() in content
    ]


class CommandLines(threading.Thread):
    """Polls the command lines of all processes."""

    def __init__(self) -> None:
        super().__init__(name="command-lines")
        self.seen: set[bytes] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:
                    continue

    def __enter__(self) -> CommandLines:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.join()


def test_no_secret_of_a_run_is_stored_by_ray(
    moto: Server,
    nginx: tuple[str, Path],
    head: str,
    ray_folder: Path,
    tmp_path: Path,
    run_gatdist: Callable[..., CompletedProcess[str]],
) -> None:
    address, root = nginx
    write_digits(Store(str(root / "signed" / "under-ray")))
    (tmp_path / "notes.py").write_text(PLUGIN)
    seen = tmp_path / "seen"
    seen.mkdir()
    bucket = moto.new_bucket()
    data = f"{address}/signed/under-ray?sig=${{env:PLANTED_SIGNATURE}}&more={LITERAL['query']}"
    keys = 'key="${env:PLANTED_KEY}", secret="${env:PLANTED_SECRET}"'
    headers = f'Authorization="Bearer ${{env:PLANTED_HEADER}}", Cookie="{LITERAL["cookie"]}"'
    variables = f'HUB_TOKEN="${{env:PLANTED_HUB}}", PLAIN="{VISIBLE}", SEEN="{seen}"'
    sets = [
        *SMALL,
        f'run.storage_options={{{keys}, client_kwargs={{endpoint_url="{moto.address}"}}}}',
        f'data.url="{data}"',
        f"data.storage_options={{headers={{{headers}}}}}",
        f"cluster.runtime_env={{env_vars={{{variables}}}}}",
        'plugins=["notes"]',
    ]
    train = ["train", "digits", "--workers", "2", "--address", head, "--json"]
    train += [word for setting in sets for word in ("--set", setting)]

    def run(name: str) -> CompletedProcess[str]:
        command = [*train, "--run-dir", f"{bucket}/{name}"]
        return run_gatdist(*command, env=REFERRED, cwd=tmp_path, timeout=300)

    with CommandLines() as lines:
        ended = run("whole")
        assert ended.returncode == 0, ended.stderr
        # Workers find a shard missing, and Ray logs what they raise.
        (root / "signed" / "under-ray" / "shard-000000.tar").unlink()
        failed = run("torn")
        assert failed.returncode == 2
        assert "shard-000000.tar" in failed.stderr
    kept = {str(p): p.read_bytes() for p in ray_folder.rglob("*") if p.is_file()}
    assert any(VISIBLE.encode() in content for content in kept.values()), "nothing is found at all"
    assert any(b"shard-000000.tar" in content for content in kept.values())
    store = Store(bucket, moto.options(moto.address))
    kept |= {name: store.read(name) for name in store.find()}
    kept |= {"ended": (ended.stdout + ended.stderr).encode()}
    kept |= {"failed": (failed.stdout + failed.stderr).encode()}
    assert {name: found_in(content) for name, content in kept.items() if found_in(content)} == {}
    workers = [line for line in lines.seen if b"ray::" in line or b"default_worker" in line]
    assert workers
    assert [line for line in workers if found_in(line)] == []
    message = [path.read_text() for path in seen.iterdir()]
    assert sum(REFERRED["PLANTED_HUB"] in one for one in message) >= 2
    assert sum(VISIBLE in one for one in message) >= 2
