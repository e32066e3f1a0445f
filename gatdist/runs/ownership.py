"""Whose configuration a run's ``config.json`` is: the user's own, or one that others wrote.

A configuration names URLs, with references to the environment in them, and programs. The user's own
may; of one that others wrote, only what says how samples are made is used, and data beside the run.
A configuration is the user's own if the same was trained with here: its digest is in the user's
cache folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from gatdist.common.errors import ConfigError, GatdistError
from gatdist.config import Config, cache_folder, parse_config, redact_url, set_value
from gatdist.storage import OutsideUrl, Store

# What leads elsewhere, or runs a program, when a run is evaluated.
_LOCATIONS = (
    ("data", "storage_options"),
    ("data", "shards_url"),
    ("data", "shards_storage_options"),
    ("evaluate", "features_file"),
)


def remember(config: Config) -> None:
    """Note that a configuration is the user's own, as far as the cache folder can be written."""
    with suppress(GatdistError):
        store = _store()
        if not store.exists(_digest(config)):
            store.publish(_digest(config), b"")


def adopted(config: Config, overrides: Sequence[str], run: Store) -> Config:
    """The configuration of a run, as far as it may be followed to data and programs.

    Args:
        config: of the run.
        overrides: the user's own ``section.key=value``.
        run: its folder.

    Raises:
        ConfigError: it is not the user's own, and names what only the user may name; the message
            says which key to give.
    """
    values = config.model_dump(mode="json")
    given: dict[str, Any] = {}
    for override in overrides:
        set_value(given, override)
        set_value(values, override)
    if not _is_own(config):
        if "url" not in given.get("data", {}):
            _require_beside(config.data.url, run)
        for section, key in _LOCATIONS:
            if key not in given.get(section, {}) and values[section][key]:
                raise _refused(run, f"{section}.{key}", values[section][key])
        if "cache_dir" not in given.get("data", {}):
            values["data"]["cache_dir"] = None
    return parse_config(values)


def _require_beside(url: str, run: Store) -> None:
    if url.startswith("builtin:"):
        return
    try:
        run.reach(OutsideUrl(url))
    except ValueError:
        raise _refused(run, "data.url", url) from None


def _refused(run: Store, key: str, value: object) -> ConfigError:
    shown = redact_url(value) if isinstance(value, str) else "{…}"
    return ConfigError(
        f"{run.url}/config.json: {key}",
        "names what only your own configuration may name, and this run was not trained by you here",
        value=shown,
        hint=f"If you trust it: --set '{key}={json.dumps(shown)}'"
        if isinstance(value, str)
        else f"If you trust it: --set '{key}={{…}}'",
    )


def _is_own(config: Config) -> bool:
    try:
        return _store().exists(_digest(config))
    except GatdistError:
        return False


def _digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(config.redacted(), sort_keys=True).encode()).hexdigest()


def _store() -> Store:
    return Store(str(cache_folder() / "own"))
