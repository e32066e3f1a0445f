"""Environment variables: references to secrets, the cache folder, and the user's modules."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gatdist.common.errors import ConfigError, PluginError

REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_REFERENCES = re.compile(rf"(?:{REFERENCE.pattern}|:)+")  # USER:PASSWORD may be two
_SECRET = re.compile(
    r"key|secret|token|passw|credential|auth|sas|connection_string|cookie|signature", re.IGNORECASE
)
# In HTTP, a user without a password may be a token; in Azure, it is the container.
_PASSWORD = re.compile(r"((?<=://)(?!\$\{)[^/\s:@]*:|(?<=http://)|(?<=https://))([^/\s]+)(?=@)")
_URL_WITH_QUERY = re.compile(r"https?://[^\s'\"?]*\?[^\s'\"]*")
_QUERY_VALUE = re.compile(r"([?&][^=&]*=)([^&]+)")


def expand_env(text: str) -> str:
    """Replace each ``${env:NAME}`` by the variable. Raises ConfigError if it is not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(
                f"${{env:{name}}}", "that environment variable is not set", hint=f"export {name}=…"
            )
        return os.environ[name]

    return REFERENCE.sub(value, text)


def env_values(text: str, more: Iterable[tuple[str, str]] = ()) -> dict[str, str]:
    """Return variables for another process: those in ``text``, and expanded values of ``more``.

    Values of ``more`` without a reference are skipped. Raises ConfigError if one is not set.
    """
    found = {name: expand_env(f"${{env:{name}}}") for name in REFERENCE.findall(text)}
    return found | {name: expand_env(value) for name, value in more if REFERENCE.search(value)}


def set_env(values: Mapping[str, str]) -> None:
    """Set variables that another process has sent."""
    os.environ.update(values)


def is_secret(key: str) -> bool:
    """Whether a key of that name may hold a secret."""
    return bool(_SECRET.search(key))


def redact_url(text: str) -> str:
    """Mask passwords and query values in the URLs of a text. ``${env:NAME}`` is kept."""

    def masked(match: re.Match[str]) -> str:
        before, secret = match.groups()
        return before + (secret if _REFERENCES.fullmatch(secret) else "***")

    text = _PASSWORD.sub(masked, text)
    return _URL_WITH_QUERY.sub(lambda url: _QUERY_VALUE.sub(masked, url[0]), text)


def silence_profiler() -> None:
    """Keep torch's profiler from logging. Call it before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


# With which cuBLAS is deterministic; torch takes no others.
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


def set_cuda_variables(*, deterministic: bool) -> list[str]:
    """Set what CUDA and torch's allocator read at their start; call it before.

    Variables that are set stay as they are.

    Args:
        deterministic: Whether cuBLAS must be.

    Returns:
        Names of the variables that were not set.
    """
    wanted = {}
    if deterministic:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = _DETERMINISTIC_WORKSPACES[0]
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Batches for previews and evaluations differ in size from those for training; fixed
        # segments would fragment.
        wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    missing = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in missing})
    return missing


@contextmanager
def cuda_variables(*, deterministic: bool) -> Iterator[None]:
    """Set the variables of :func:`set_cuda_variables` in this context."""
    names = set_cuda_variables(deterministic=deterministic)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def require_deterministic_workspace() -> None:
    """Raise ConfigError if the environment makes cuBLAS nondeterministic."""
    name, default = "CUBLAS_WORKSPACE_CONFIG", _DETERMINISTIC_WORKSPACES[0]
    if (value := os.environ.get(name, default)) not in _DETERMINISTIC_WORKSPACES:
        rule = f"must be {' or '.join(_DETERMINISTIC_WORKSPACES)} under run.reduction = 'canonical'"
        raise ConfigError(name, rule, value=value, hint="Unset it: gatdist sets it for its workers")


def cache_folder() -> Path:
    """Return the folder of built-in data sets and features: ``$GATDIST_CACHE`` or the user's."""
    if own := os.environ.get("GATDIST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gatdist"


def import_plugins(names: Iterable[str]) -> None:
    """Import the user's modules, also from the current folder.

    Raises:
        PluginError: a module is not found, or raises an exception.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit, GeneratorExit) as error:  # not Ctrl-C
            kind = type(error).__name__
            raise PluginError(
                "plugins",
                f"the module does not import ({kind}: {error})",
                value=name,
                hint="Run the command from the folder that holds it, install it, or fix it",
            ) from error
