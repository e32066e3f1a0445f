"""Secrets are given to a run in every way, and searched in all of its files and output."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from servers import NGINX_USER, Server

from gatdist.cli import main
from gatdist.data.builtin import write_digits
from gatdist.storage import Store
from gatdist.storage.connection import Connection
from support import free_port

pytestmark = pytest.mark.storage

# By reference to environment variables; nginx requires the last.
REFERRED = {
    "PLANTED_KEY": "AKIAPLANTED0001",
    "PLANTED_HEADER": "planted-header-0002",
    "PLANTED_SIGNATURE": "s3cr3t",
}
# Written out in the configuration, against the documentation.
LITERAL = {"secret": "planted-secret-0003", "cookie": "planted-cookie-0004"}
LITERAL |= {
    "password": "planted-password-0005",
    "runtime": "planted-runtime-0006",
    "query": "planted-query-0007",
}
SMALL = [
    "run.total_samples=64",
    "run.global_batch=16",
    "run.log_every_samples=32",
    "run.checkpoint_every_samples=32",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    'evaluate={metrics=["swd"], features="points", num_samples=64}',
]


@pytest.fixture
def planted(
    moto: Server, nginx: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[str]]:
    """Return the URL of a run, and the options of ``gatdist train``: S3, and data by HTTP."""
    for name, value in REFERRED.items():
        monkeypatch.setenv(name, value)
    # For `inspect` and the like, which have no options.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", REFERRED["PLANTED_KEY"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", LITERAL["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.address)
    monkeypatch.chdir(tmp_path)
    address, root = nginx
    write_digits(Store(str(root / "signed" / "digits")))
    endpoint = f'client_kwargs={{endpoint_url="{moto.address}"}}'
    headers = f'Authorization="Bearer ${{env:PLANTED_HEADER}}", Cookie="{LITERAL["cookie"]}"'
    sets = [
        *SMALL,
        f'run.storage_options={{key="${{env:PLANTED_KEY}}", secret="{LITERAL["secret"]}", '
        f"{endpoint}}}",
        f'data.url="{address}/signed/digits?sig=${{env:PLANTED_SIGNATURE}}&more={LITERAL["query"]}"',
        f"data.storage_options={{headers={{{headers}}}}}",
        f'cluster.runtime_env={{env_vars={{HUB_TOKEN="{LITERAL["runtime"]}"}}}}',
    ]
    url = f"{moto.new_bucket()}/runs/planted"
    return url, [word for setting in sets for word in ("--set", setting)]


def found_in(content: bytes) -> list[str]:
    """Return the secrets that it contains, plain or encoded."""
    secrets = [*REFERRED.values(), *LITERAL.values(), NGINX_USER[1]]
    return [
        secret
        for secret in secrets
        for form in (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode())
        if form.encode() in content
    ]


@pytest.fixture
def message(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command and returns its output, which has no secret."""

    def run(*arguments: str, status: int = 0) -> str:
        ended = main(list(arguments))
        output, errors = capfd.readouterr()
        assert ended == status, errors
        assert found_in((output + errors).encode()) == [], output + errors
        return output + errors

    return run


@pytest.fixture
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the time for retries."""
    as_it_is = Connection.__init__

    def soon(self: Connection, url: str, options: Any, **more: float) -> None:
        as_it_is(self, url, options, **(more | {"retry_budget_s": 0.2}))

    monkeypatch.setattr(Connection, "__init__", soon)


def test_no_secret_is_in_files_or_output_of_a_run(
    planted: tuple[str, list[str]], message: Callable[..., str], tmp_path: Path, session_cache: Path
) -> None:
    url, sets = planted
    train = ["train", "digits", "--local", "--run-dir", url, *sets]
    assert "***" in message(*train, "--dry-run")
    message(*train, "--dry-run", "--json")
    message(*train, "--json", "--profile", "steps=1:3")
    message(*train)  # again: it has finished
    for command in (["inspect", url], ["evaluate", url], ["inspect", "--digest", url]):
        message(*command)
        message(*command, "--json")
    message("sample", url, "--num", "4", "--out", "fakes")
    message("export", url, "--format", "safetensors", "--out", "generator")
    message("report", url, "--out", "report.html")
    message("verify", url, "--workers", "1")
    store = Store(url)
    written = {name: store.read(name) for name in store.find()}
    kinds = ["config.json", "attempts.jsonl", "metrics.jsonl"]
    kinds += ["tensorboard/", "checkpoints/", "profiles/"]
    assert all(any(name.startswith(kind) for name in written) for kind in kinds), written.keys()
    for folder in (tmp_path, session_cache):
        written |= {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {name: found_in(content) for name, content in written.items() if found_in(content)} == {}
    assert b"${env:PLANTED_SIGNATURE}" in written["config.json"], "references are kept"


@pytest.mark.usefixtures("short_retries")
def test_no_secret_is_printed_when_storage_fails(
    planted: tuple[str, list[str]], message: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sets = planted
    train = ["train", "digits", "--local", "--run-dir", url, *sets]
    nobody = f"http://reader:{LITERAL['password']}@127.0.0.1:{free_port()}/x?sig=planted-sig-7"
    for setting, status in (
        (f'data.url="{nobody}"', 75),
        (f'data.url="nosuch://reader:{LITERAL["password"]}@host/x"', 2),
        (f'model.init_from="nosuch://reader:{LITERAL["password"]}@host/x"', 2),
        (f'data.storage_options="{LITERAL["secret"]}"', 2),
        (f'run.storage_options={{key="x", secret="{LITERAL["secret"]}", client_kwargs=1}}', 2),
        (f"data.storage_options.password={LITERAL['password']} {LITERAL['password']}", 2),
    ):
        for more in ([], ["--json"]):
            # aiohttp accepts no password in addition to its own header.
            plain = ["--set", "data.storage_options={}"] if nobody in setting else []
            printed = message(*train, *plain, "--set", setting, *more, status=status)
            assert "planted-sig-7" not in printed
            assert "Traceback" not in printed
    for command in ("inspect", "evaluate", "verify"):
        assert "reader:***@" in message(command, nobody, status=75)
    monkeypatch.setenv("PLANTED_SIGNATURE", LITERAL["password"])
    assert "(403" in message(*train, status=2)
