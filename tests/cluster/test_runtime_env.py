"""``cluster.runtime_env`` and plugins reach workers that do not have the driver's folder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from gatdist.cluster.runtime_env import of_run, secret_variables
from gatdist.common.errors import ConfigError
from gatdist.config import load_config
from support import need

pytestmark = pytest.mark.cluster

PLUGIN = """
import json, os, pathlib
if "SEEN" in os.environ:
    import module_in_working_dir
    seen = {"file": __file__, "plain": os.environ["PLAIN"], "module": module_in_working_dir.VALUE}
    seen |= {name: os.environ.get(name) for name in os.environ["READ"].split()}
    pathlib.Path(os.environ["SEEN"], str(os.getpid())).write_text(json.dumps(seen))
"""


def run_of(**runtime_env: object) -> dict[str, object]:
    config = load_config("ring")
    cluster = config.cluster.model_copy(update={"runtime_env": runtime_env})
    return of_run(config.model_copy(update={"cluster": cluster}))


@pytest.mark.parametrize(
    ("runtime_env", "field"),
    [
        ({"working_dir": "/nonexistent"}, ".working_dir"),
        ({"working_dir": "absent/folder"}, ".working_dir"),
        ({"working_dir": 7}, ".working_dir"),
        ({"py_modules": ["/nonexistent/module"]}, ".py_modules"),
        ({"py_modules": "x"}, ".py_modules"),
        ({"env_vars": {"N": 1}}, ".env_vars"),
        ({"env_vars": ["N"]}, ".env_vars"),
        ({"pip": 7}, ""),
        ({"conda": "/nonexistent.yaml"}, ""),
    ],
)
def test_runtime_env_with_invalid_value_is_rejected(
    runtime_env: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(**runtime_env)
    assert caught.value.subject == f"cluster.runtime_env{field}"


def test_runtime_env_contains_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "planted-value")
    given = {"env_vars": {"TOKEN": "Bearer ${env:PLANTED}", "PLAIN": "1"}}
    assert run_of(**given) == {"env_vars": {"PLAIN": "1"}}
    config = load_config("ring")
    cluster = config.cluster.model_copy(update={"runtime_env": given})
    found = secret_variables(config.model_copy(update={"cluster": cluster}))
    assert found == {"TOKEN": "Bearer planted-value", "PLANTED": "planted-value"}


def test_runtime_env_with_missing_folder_starts_nothing(
    run_gatdist: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    setting = 'cluster.runtime_env={working_dir="/nonexistent"}'
    command = ["train", "ring", "--workers", "2", "--run-dir", tmp_path / "run", "--set", setting]
    ended = run_gatdist(*command, timeout=300)
    assert ended.returncode == 2
    (message,) = ended.stderr.splitlines()
    assert message.startswith("gatdist: cluster.runtime_env.working_dir = '/nonexistent': ")
    assert not (tmp_path / "run").exists()


def test_runtime_env_and_plugins_are_shipped(ray_address: str, tmp_path: Path) -> None:
    """The driver's folder is on a file system that only the driver has mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounts a file system")
    (unshare,) = need("unshare")
    (tmp_path / "plugin.py").write_text(PLUGIN)
    for name in ("working", "seen", "hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "working" / "module_in_working_dir.py").write_text("VALUE = 'shipped'\n")
    on_cuda = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    variables = f'PLAIN="reached", SEEN="{tmp_path}/seen", READ="{" ".join(on_cuda)}"'
    sets = [
        *("run.total_samples=32", "run.global_batch=16", "run.log_every_samples=16"),
        "run.reduction=canonical",
        *("run.checkpoint_every_samples=32", "evaluate.metrics=[]", 'plugins=["notes_hidden"]'),
        f'cluster.runtime_env={{env_vars={{{variables}}}, working_dir="{tmp_path}/working"}}',
    ]
    train = [sys.executable, "-m", "gatdist", "train", "ring", "--workers", "2", "--json"]
    train += ["--address", ray_address, "--run-dir", str(tmp_path / "run")]
    train += [word for setting in sets for word in ("--set", setting)]
    hidden = f"{tmp_path}/hidden"
    script = (
        f"mount -t tmpfs none {hidden} && cp {tmp_path}/plugin.py {hidden}/notes_hidden.py && "
        f"cd {hidden} && exec {shlex.join(train)}"
    )
    ended = subprocess.run(
        [unshare, "-m", "sh", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert not list((tmp_path / "hidden").iterdir())
    message = [json.loads(path.read_text()) for path in (tmp_path / "seen").iterdir()]
    assert len(message) >= 2
    for one in message:
        assert (one["plain"], one["module"]) == ("reached", "shipped")
        assert on_cuda.items() <= one.items()
        assert not one["file"].startswith(hidden)
