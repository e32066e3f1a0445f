"""Workers' runtime environment: ``cluster.runtime_env``, the user's modules, and secrets.

Ray writes a runtime environment to its logs, its head's tables and command lines. Values of
``${env:NAME}`` are never in it: the driver's mailbox sends them, from memory to memory
(:meth:`gatdist.cluster.bridge.Bridge.give`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatdist.cluster.connection import module_folders  # sets up Ray's import

# isort: split
from ray.runtime_env import RuntimeEnv

from gatdist.cluster.preflight import Marker
from gatdist.common.errors import ConfigError
from gatdist.config import REFERENCE, Config, env_values

_FIELD = "cluster.runtime_env"


def of_run(config: Config) -> dict[str, Any]:
    """Return Ray's runtime environment for a run's workers, without secrets.

    On a cluster, plugins that are not installed are sent along, for hosts without the driver's
    folder.

    Raises:
        ConfigError: Ray rejects it, or a folder or file in it does not exist.
    """
    runtime = {name: value for name, value in config.cluster.runtime_env.items() if value}
    variables = runtime.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(v, str) for v in variables.values()):
        rule = "must be a table of strings"
        raise ConfigError(f"{_FIELD}.env_vars", rule, hint='Write env_vars = { NAME = "value" }')
    runtime["env_vars"] = {k: v for k, v in variables.items() if not REFERENCE.search(v)}
    if (folder := runtime.get("working_dir")) is not None:
        runtime["working_dir"] = _local(folder, f"{_FIELD}.working_dir", folders_only=True)
    modules = runtime.get("py_modules", [])
    if not isinstance(modules, list):
        raise ConfigError(f"{_FIELD}.py_modules", "must be a list of paths or URLs")
    modules = [_local(module, f"{_FIELD}.py_modules") for module in modules]
    if config.cluster.address:
        modules += _not_installed(config.plugins)
    if modules:
        runtime["py_modules"] = list(dict.fromkeys(modules))
    try:
        RuntimeEnv(**runtime)
    except (TypeError, ValueError) as error:
        raise ConfigError(_FIELD, f"Ray rejects it ({' '.join(str(error).split())})") from None
    return runtime


def at_start(config: Config, run_dir: str, marker: Marker) -> dict[str, Any]:
    """Return what workers need to start, with secrets; for :meth:`Bridge.give`.

    Raises:
        ConfigError: a variable that the configuration refers to is not set.
    """
    return {
        "config": config.model_dump_json(),
        "run_dir": run_dir,
        "marker": marker,
        "environment": secret_variables(config),
        "folders": module_folders(),
    }


def secret_variables(config: Config) -> dict[str, str]:
    """Return the environment variables that workers get and Ray must not see.

    Raises:
        ConfigError: one that the configuration refers to is not set.
    """
    return env_values(
        config.model_dump_json(), config.cluster.runtime_env.get("env_vars", {}).items()
    )


def prefer_folders(folders: Sequence[str]) -> None:
    """Prefer modules in the driver's folders, where a worker has them, to copies sent along."""
    there = [folder for folder in folders if os.path.isdir(folder)]
    sys.path[:] = [*there, *(path for path in sys.path if path not in there)]


def _local(path: object, field: str, *, folders_only: bool = False) -> str:
    """Return an existing absolute path, or a URL as it is."""
    if not isinstance(path, str):
        raise ConfigError(field, "must be a path or URL", value=path)
    if "://" in path:
        return path
    found = Path(path).expanduser().absolute()
    if not found.exists() or (folders_only and not (found.is_dir() or found.suffix == ".zip")):
        raise ConfigError(field, "no such folder", value=path, hint="Check the path")
    return str(found)


def _not_installed(plugins: Sequence[str]) -> list[str]:
    """Return the files or folders of modules that are not installed."""
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    found = []
    for name in dict.fromkeys(plugin.partition(".")[0] for plugin in plugins):
        spec = importlib.util.find_spec(name)
        places = list((spec and spec.submodule_search_locations) or ())
        path = Path(places[0] if places else (spec and spec.origin) or "")
        is_installed = any(path.is_relative_to(place) for place in installed)
        if path.name and path.exists() and path.suffix in ("", ".py") and not is_installed:
            found.append(str(path))
    return found
