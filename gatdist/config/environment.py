"""What is read of the environment: secrets by reference, the cache folder, the user's modules."""

from __future__ import annotations

import importlib
import importlib.resources
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from gatdist.common.errors import ConfigError, PluginError

REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_REFERENCES = re.compile(rf"(?:{REFERENCE.pattern}|:)+")  # USER:PASSWORD may be two
_SECRET = re.compile(
    r"key|secret|token|passw|credential|auth|sas|connection_string|cookie|signature", re.IGNORECASE
)
# Of HTTP, a user without a password may be a token; of Azure, it is the container.
_PASSWORD = re.compile(r"((?<=://)(?!\$\{)[^/\s:@]*:|(?<=http://)|(?<=https://))([^/\s]+)(?=@)")
_URL_WITH_QUERY = re.compile(r"https?://[^\s'\"?]*\?[^\s'\"]*")
_QUERY_VALUE = re.compile(r"([?&][^=&]*=)([^&]+)")


def expand_env(text: str) -> str:
    """Replace each ``${env:NAME}`` by that environment variable.

    Raises:
        ConfigError: it is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(
                f"${{env:{name}}}", "that environment variable is not set", hint=f"export {name}=…"
            )
        return os.environ[name]

    return REFERENCE.sub(value, text)


def env_values(text: str, more: Iterable[tuple[str, str]] = ()) -> dict[str, str]:
    """Variables for another process: those that ``text`` refers to, and others.

    Args:
        text: with references.
        more: names and values; a value without a reference is left out.

    Raises:
        ConfigError: a variable is not set.
    """
    found = {name: expand_env(f"${{env:{name}}}") for name in REFERENCE.findall(text)}
    return found | {name: expand_env(value) for name, value in more if REFERENCE.search(value)}


def set_env(values: Mapping[str, str]) -> None:
    """Take over variables that another process has sent."""
    os.environ.update(values)


def is_secret(key: str) -> bool:
    """Whether the value of a storage option of that name is not to be shown."""
    return bool(_SECRET.search(key))


def redact_url(text: str) -> str:
    """A URL, or a text with URLs in it, without passwords and the values of a query.

    References to the environment are kept.
    """

    def masked(match: re.Match[str]) -> str:
        before, secret = match.groups()
        return before + (secret if _REFERENCES.fullmatch(secret) else "***")

    text = _PASSWORD.sub(masked, text)
    return _URL_WITH_QUERY.sub(lambda url: _QUERY_VALUE.sub(masked, url[0]), text)


def silence_profiler() -> None:
    """Have torch's profiler tell standard error nothing of itself. For before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def cache_folder() -> Path:
    """Where embedded data sets and feature extractors are kept.

    ``$GATDIST_CACHE``, else the user's cache folder.
    """
    if own := os.environ.get("GATDIST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gatdist"


def import_plugins(names: Iterable[str]) -> None:
    """Import the user's modules, which register networks, losses and so on.

    The current folder is importable, as under ``python -m``.

    Raises:
        PluginError: a module is not found, or raises while it is imported.
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
                hint="Run the command from the folder that holds it, install it, or hint it",
            ) from error
