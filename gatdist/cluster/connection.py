"""A Ray to work on: one of our own on this machine, or a cluster that runs already."""

from __future__ import annotations

import os
import secrets
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
# Of a head that is started from here: `ray job stop` waits so long for the last checkpoint.
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
        hint="pip install 'ray[default,train]', or work in this process with --local",
    ) from error

from gatdist.common.errors import ClusterError
from gatdist.storage import Store

_CONNECT_S = 5.0
# In Ray's temporary folder, and what Linux allows.
_SOCKET = "session_2026-01-01_00-00-00_000000_{process}/sockets/plasma_store"
_LONGEST_SOCKET_BYTES = 107


@contextmanager
def connected(
    address: str,
    log: Path,
    object_store_bytes: int,
    runtime_env: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Connected to a Ray.

    Args:
        address: of a cluster; "" starts a Ray that lives and dies with this process.
        log: where Ray's own output goes, for messages.
        object_store_bytes: memory of a Ray of our own for what is sent through it.
        runtime_env: what workers need beside gatdist. Ray logs it: it holds no secrets.

    Raises:
        ClusterError: nobody answers at the address, the cluster does not take our token, or Ray
            does not start.
    """
    settings: dict[str, Any] = {"address": address}
    if address:
        reachable(address)
    else:
        settings = {
            "address": "local",
            "num_cpus": os.cpu_count() or 1,
            "include_dashboard": False,
            "object_store_memory": object_store_bytes,
        }
    given = dict(runtime_env or {})
    runtime = given | {"env_vars": _environment(given.get("env_vars", {}))}
    with ExitStack() as stack:
        if not address:
            stack.enter_context(_token_of_our_own())
        stack.enter_context(_initialized(runtime, settings, address, log))
        yield


@contextmanager
def _initialized(
    runtime: dict[str, Any], settings: dict[str, Any], address: str, log: Path
) -> Iterator[None]:
    try:
        ray.init(log_to_driver=False, runtime_env=runtime, **settings)
    except ray.exceptions.AuthenticationError as error:
        raise _preflight_failed(address, "there is none here") from error
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"no Ray cluster answers ({error})" if address else f"Ray did not start ({error})"
        raise ClusterError("cluster.address", what, value=address, hint=f"See {log}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _token_of_our_own() -> Iterator[None]:
    """Nobody else connects to a Ray that is started in here: its ports are open on all interfaces.

    Who has set a mode of authentication has said what is wanted.
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
    """Set or remove them, and let Ray, which keeps what they were, read them again."""
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def require_temporary_folder(*, for_ray: bool) -> None:
    """Refuse a temporary folder that can't be used, or in which Ray could not make its sockets.

    Args:
        for_ray: whether a Ray of our own is to be started.

    Raises:
        ClusterError: names the variable, and what to set it to.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        rule = f"no temporary folder can be written ({error.strerror})"
        raise ClusterError(
            "TMPDIR", rule, hint="Set TMPDIR to a folder that you can write"
        ) from None
    if not for_ray:
        return
    folder = Path(get_default_ray_temp_dir())  # type: ignore[no-untyped-call]
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    if len(os.fsencode(folder / _SOCKET.format(process=os.getpid()))) > _LONGEST_SOCKET_BYTES:
        raise ClusterError(
            variable,
            f"Ray makes sockets in there, and the path of a socket has at most "
            f"{_LONGEST_SOCKET_BYTES} bytes",
            value=str(folder.parent),
            hint=f"Set {variable} to a shorter folder",
        )
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ClusterError(
            variable,
            f"Ray keeps its files in {folder}, and {existing} can't be written",
            value=str(folder.parent),
            hint=f"Set {variable} to a folder that you can write",
        )


def log_file(url: str) -> Path:
    """Where Ray's output goes: into the folder ``logs`` at ``url`` where that is local."""
    store = Store(url)
    if store.is_local:
        return store.local_path("logs") / "ray.log"
    return Path(tempfile.mkdtemp(prefix="gatdist-logs-")) / "ray.log"


def reachable(address: str) -> str:
    """HOST:PORT of a cluster that answers and lets us in.

    Args:
        address: that, or ``auto``.

    Raises:
        ClusterError: nobody answers there, or the cluster does not take our token.
    """
    found = _found(address)
    if ":" in found:
        _require_answer(found)
        _require_preflight(found)
    return found


def _found(address: str) -> str:
    """HOST:PORT of what ``auto`` leads to, as far as that can be told; any other address as is."""
    if address != "auto":
        return address
    try:
        return services.get_ray_address_from_environment(address, None)
    except ConnectionError:  # which Ray will tell
        return address


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            "cluster.address",
            f"nobody answers there ({error})",
            value=address,
            hint="Start Ray there (ray start --head), or leave it out to use this machine",
        ) from None


def _require_preflight(address: str) -> None:
    """Raise if the cluster refuses us.

    Ray itself would try for 20 s, and then not say that it is about a token.
    """
    try:
        with create_gcs_channel(address) as channel:
            gcs = NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            gcs.GetClusterId(GetClusterIdRequest(), timeout=_CONNECT_S)
    except ray.exceptions.AuthenticationError as error:
        raise _preflight_failed(address, "there is none here") from error
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise _preflight_failed(address, "it does not take ours") from None
        # Of the rest Ray tells.


def _preflight_failed(address: str, why: str) -> ClusterError:
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return ClusterError(
        "cluster.address",
        f"the cluster wants a token, and {why} (RAY_AUTH_MODE is {mode})",
        value=address,
        hint="Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token as they are on the "
        "head (ray get-auth-token)",
    )


def module_folders() -> list[str]:
    """Where this process finds the user's modules, and gatdist."""
    folders = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    package = str(Path(sys.modules["gatdist"].__path__[0]).parent)
    return list(dict.fromkeys([*folders, package]))


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """What workers need of the driver's environment to find modules, and what the user gives."""
    requested = ("GATDIST_CACHE", "OMP_NUM_THREADS")
    found = {name: os.environ[name] for name in requested if name in os.environ} | dict(given)
    folders = [*filter(None, given.get("PYTHONPATH", "").split(os.pathsep)), *module_folders()]
    return found | {"PYTHONPATH": os.pathsep.join(folders)}
