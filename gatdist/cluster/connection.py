"""Connects to a Ray cluster, or starts Ray on this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# Before Ray is imported, which reads some of these then.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# For a head that is started from here: `ray job stop` waits this long for the last checkpoint.
os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", "120")

try:
    import grpc  # type: ignore[import-untyped]
    import ray
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private import services
    from ray._private.gcs_utils import create_gcs_channel
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
except ImportError as error:
    from gatdist.common.errors import ClusterError

    raise ClusterError(
        "ray",
        f"can't be imported ({error})",
        hint="pip install 'ray[data,default,train]', or use one process (train --local)",
    ) from error

from gatdist.common.errors import ClusterError
from gatdist.storage import Store

_CONNECT_S = 5.0
# gatdist sends and stores little through Ray; Ray's default takes a third of the memory.
_OBJECT_STORE_BYTES = 100 * 2**20
# In Ray's temporary folder, and Linux' limit.
_SOCKET = "session_2026-01-01_00-00-00_000000_{process}/sockets/plasma_store"
_LONGEST_SOCKET_BYTES = 107


@contextmanager
def connected(
    address: str,
    log: Path,
    *,
    object_store_bytes: int = _OBJECT_STORE_BYTES,
    runtime_env: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Connect this process to Ray for the length of a context.

    Args:
        address: Of a cluster; "" starts a Ray that ends with the context.
        log: File with Ray's own output, for messages.
        object_store_bytes: Memory of a Ray that is started here, for objects sent through it.
        runtime_env: Ray runtime environment of the workers. Ray logs it: it holds no secrets.

    Raises:
        ClusterError: the address does not answer or rejects the token, or Ray does not start.
    """
    given = dict(runtime_env or {})
    runtime = given | {"env_vars": _environment(given.get("env_vars", {}))}
    with ExitStack() as stack:
        if address:
            reachable(address)
            settings: dict[str, Any] = {"address": address}
        else:
            stack.enter_context(_private_token())
            settings = {
                "address": "local",
                "num_cpus": os.cpu_count() or 1,
                "include_dashboard": False,
                "object_store_memory": object_store_bytes,
            }
        try:
            ray.init(log_to_driver=False, runtime_env=runtime, **settings)
        except ray.exceptions.AuthenticationError as error:
            raise _token_rejected(address, "none is set here") from error
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            what = "no Ray cluster answers" if address else "Ray does not start"
            raise ClusterError(
                "cluster.address", f"{what} ({error})", value=address, hint=f"See {log}"
            ) from error
        stack.callback(ray.shutdown)
        yield


@contextmanager
def _private_token() -> Iterator[None]:
    """Protect a Ray that is started here by a random token: its ports are open on all interfaces.

    An authentication mode that the user has set is kept.
    """
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    _set_authentication({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    try:
        yield
    finally:
        _set_authentication(before)


def _set_authentication(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    AuthenticationTokenLoader.instance().reset_cache()  # Ray keeps what they were
    Config.initialize("")


def require_temporary_folder(*, for_ray: bool) -> None:
    """Reject a temporary folder that is not writable, or too deep for Ray's sockets.

    Ray's sockets matter if it will be started on this machine. The ClusterError names the variable
    to set.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ClusterError(
            "TMPDIR",
            f"no temporary folder is writable ({error.strerror})",
            hint="Set TMPDIR to a writable folder",
        ) from None
    if not for_ray:
        return
    folder = Path(get_default_ray_temp_dir())  # type: ignore[no-untyped-call]
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if len(os.fsencode(folder / _SOCKET.format(process=os.getpid()))) > _LONGEST_SOCKET_BYTES:
        limit = f"the path of a socket has at most {_LONGEST_SOCKET_BYTES} bytes"
        rule, hint = f"is too long for Ray's sockets: {limit}", f"Set {variable} to a shorter path"
    elif not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        rule = f"Ray keeps its files in {folder}, and {existing} is not writable"
        hint = f"Set {variable} to a writable folder"
    else:
        return
    raise ClusterError(variable, rule, value=str(folder.parent), hint=hint)


def log_file(url: str) -> Path:
    """Return the file for Ray's output: in ``logs`` at ``url`` if local, else a temporary one."""
    store = Store(url)
    if store.is_local:
        return store.local_path("logs") / "ray.log"
    return Path(tempfile.mkdtemp(prefix="gatdist-logs-")) / "ray.log"


@contextmanager
def temporary_log() -> Iterator[Path]:
    """Yield a file for Ray's output in a new folder, which is kept only after an error."""
    log = Path(tempfile.mkdtemp(prefix="gatdist-logs-")) / "ray.log"
    yield log
    shutil.rmtree(log.parent)


def reachable(address: str) -> str:
    """Return HOST:PORT of a cluster that answers and accepts our token; ``auto`` if there is none.

    Raises:
        ClusterError: nobody answers there, or the cluster rejects the token.
    """
    if address == "auto":
        try:
            address = services.get_ray_address_from_environment(address, None)
        except ConnectionError:  # ray.init raises it
            return address
    if ":" in address:
        _require_answer(address)
        _require_token(address)
    return address


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            "cluster.address",
            f"does not answer ({error})",
            value=address,
            hint="Start Ray there (ray start --head), or leave it out to use this machine",
        ) from None


def _require_token(address: str) -> None:
    """Raise at once if the cluster rejects the token; Ray itself would retry for 20 s."""
    try:
        with create_gcs_channel(address) as channel:
            gcs = NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            gcs.GetClusterId(GetClusterIdRequest(), timeout=_CONNECT_S)
    except ray.exceptions.AuthenticationError as error:
        raise _token_rejected(address, "none is set here") from error
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise _token_rejected(address, "rejects this one") from None
        # ray.init raises the others.


def _token_rejected(address: str, why: str) -> ClusterError:
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return ClusterError(
        "cluster.address",
        f"the cluster requires a token, and {why} (RAY_AUTH_MODE is {mode})",
        value=address,
        hint="Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token as they are on the "
        "head (ray get-auth-token)",
    )


def module_folders() -> list[str]:
    """Return the folders of the user's modules and of gatdist."""
    folders = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    package = str(Path(sys.modules["gatdist"].__path__[0]).parent)
    return list(dict.fromkeys([*folders, package]))


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of workers: the user's, and those that lead to modules."""
    passed_on = ("GATDIST_CACHE", "OMP_NUM_THREADS")
    found = {name: os.environ[name] for name in passed_on if name in os.environ} | dict(given)
    folders = [*filter(None, given.get("PYTHONPATH", "").split(os.pathsep)), *module_folders()]
    return found | {"PYTHONPATH": os.pathsep.join(folders)}
