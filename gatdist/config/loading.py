"""Loads a configuration from presets, TOML files and ``--set``."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from gatdist.common.errors import ConfigError, nearest
from gatdist.config.environment import is_secret
from gatdist.config.models import Config
from gatdist.config.sections import PenaltyConfig

_BARE_WORD = re.compile(r"[^\s\"'\[\]{}=,#]+")


# Keys of earlier versions, for hints; * is any key.
_RENAMED = {
    "optim.*.warmup_samples": "optim.*.learning_rate.warmup",
    "optim.*.decay": "optim.*.learning_rate.shape",
    "optim.*.decay_start_samples": "optim.*.learning_rate.delay",
    "optim.*.final_fraction": "optim.*.learning_rate.end",
    "game.penalties.*.final_strength": "game.penalties.*.strength.end",
    "game.penalties.*.change_samples": "game.penalties.*.strength.samples",
    "run.tick_samples": "run.log_every_samples",
    "run.checkpoint_samples": "run.checkpoint_every_samples",
    "run.reduction_lanes": "run.virtual_workers",
    "game.averaging_half_life_samples": "game.ema_half_life_samples",
    "game.keep_fakes": "game.reuse_fakes",
    "cluster.timeout_s": "cluster.heartbeat_timeout_s",
    "cluster.late_s": "cluster.straggler_warn_s",
    "data.window_samples": "data.shuffle_window_samples",
    "data.lanes": "data.interleave",
}


def load_config(source: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a preset or TOML file, apply ``section.key=value`` overrides and check the result.

    Args:
        source: Name of a preset (:func:`preset_names`) or path of a ``.toml`` file.
        overrides: Values are TOML; a bare word is a string.

    Raises:
        ConfigError: the file is not readable, or a key or value is wrong.
    """
    source = os.fspath(source)
    values = read_toml(source) if source.endswith(".toml") else _preset(source)
    for override in overrides:
        set_value(values, override)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Check a nested mapping, such as a parsed ``config.json``.

    Raises:
        ConfigError: a key is unknown, missing or wrong.
    """
    # A missing section is reported by its first required key.
    values = {"run": {}, "data": {}, **values}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise first_error(error, values, Config) from None


def preset_names() -> list[str]:
    """Return the names of the built-in presets, sorted."""
    return sorted(
        p.name.removesuffix(".toml") for p in _presets().iterdir() if p.name.endswith(".toml")
    )


def require_unchanged(old: Config, new: Config, where: str) -> None:
    """Raise ConfigError if ``new`` changes a key that affects the result of the run ``where``."""
    before, after = old.result_keys(), new.result_keys()
    # data.interleave may follow from another key, which says more.
    for key in sorted(before.keys() | after.keys(), key=lambda k: (k == "data.interleave", k)):
        if before.get(key) != after.get(key):
            # A table may have replaced a value, or the reverse.
            parts = key.split(".")
            whole = next(
                name
                for name in (".".join(parts[: i + 1]) for i in range(len(parts)))
                if name in before or name in after
            )
            raise ConfigError(
                whole,
                f"the run in {where} was started with {_under(whole, before)!r}",
                value=_under(whole, after),
                hint="Use the old value to resume, or another --run-dir for a new run",
            )


def _under(key: str, flat: Mapping[str, Any]) -> Any:
    """Return the value of a key, or the table of those that begin with it; None without any."""
    prefix = f"{key}."
    table = {name.removeprefix(prefix): v for name, v in flat.items() if name.startswith(prefix)}
    return flat.get(key, table or None)


def _presets() -> Any:
    return importlib.resources.files("gatdist.config") / "presets"


def read_toml(path: str) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises ConfigError if it is not readable or not TOML."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            path, f"can't read the file ({error.strerror})", hint="Check the path"
        ) from None
    return _tables(path, content)


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(
            "preset",
            f"not known. {nearest(name, preset_names())}; or give a .toml file",
            value=name,
        )
    return _tables(name, (_presets() / f"{name}.toml").read_bytes())


def unicode_encoding(begin: bytes) -> str:
    """Return the codec of a text file by its first four bytes, as in RFC 4627; by default UTF-8."""
    found = json.detect_encoding(begin)
    return "utf-8-sig" if found == "utf-8" else found


def _tables(source: str, content: bytes) -> dict[str, Any]:
    encoding = unicode_encoding(content[:4])
    if encoding != "utf-8-sig":
        raise ConfigError(source, f"is encoded as {encoding.upper()}", hint="Save it as UTF-8")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(source, f"not valid TOML ({error})", hint="Save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # of numbers too long, or nested too deep, too
        raise ConfigError(source, f"not valid TOML ({error})", hint="Fix that line") from None


def set_value(
    values: dict[str, Any], override: str, option: str = "--set", form: str = "section.key=value"
) -> None:
    """Put the value of ``section.key=value`` into nested tables.

    Args:
        values: The tables.
        override: The value is TOML; a bare word is a string.
        option: Command-line option, for messages.
        form: Expected form, for messages.

    Raises:
        ConfigError: it has another form, or its value is not TOML.
    """
    path, equals, text = override.partition("=")
    *sections, key = keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(option, f"must be {form}", value=override)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        if not _BARE_WORD.fullmatch(text.strip()):
            rule, hint = "not a TOML value", "Quote a string with blanks or special characters"
            if any(map(may_be_secret, keys)):
                raise ConfigError(f"{option} {path}", rule, hint=hint) from None
            raise ConfigError(f"{option} {path}", rule, value=text, hint=hint) from None
        value = text.strip()
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{option} {path}", f"{section} is a value, not a table", value=text)
    table[key] = value


def first_error(
    error: ValidationError, values: Mapping[str, Any], model: type[BaseModel]
) -> ConfigError:
    """Return the most informative of the problems that pydantic found in ``values``.

    Unknown keys explain others. Of a union, the branch that matched furthest is reported.
    """
    problem = min(
        error.errors(),
        key=lambda p: (p["type"] != "extra_forbidden", p["type"].endswith("_type"), -len(p["loc"])),
    )
    keys = _keys(problem["loc"], values, is_missing=problem["type"] == "missing")
    key = ".".join(keys)
    if renamed := _renamed(keys):
        return ConfigError(key, "unknown key", hint=f"It was renamed to {renamed}")
    if problem["type"] == "extra_forbidden":
        return ConfigError(key, f"unknown key. {nearest(keys[-1], _fields_at(keys[:-1], model))}")
    if problem["type"] == "missing":
        return ConfigError(key, "is required", hint=f"Add it to the file, or use --set {key}=VALUE")
    rule = (
        "must be a table of keys"
        if problem["type"] in ("dict_type", "model_type")
        else problem["msg"]
    )
    rule = rule[0].lower() + rule[1:]
    if any(map(may_be_secret, keys)):
        return ConfigError(key, rule)
    value = problem["input"]
    fields = _fields_at(keys, model)
    hint = f"Set {key}.name" if "name" in fields and isinstance(value, str) else ""
    return ConfigError(key, rule, value=value, hint=hint)


def _renamed(keys: list[str]) -> str | None:
    for old, new in _RENAMED.items():
        pattern = old.split(".")
        if len(pattern) == len(keys) and all(
            p in ("*", k) for p, k in zip(pattern, keys, strict=True)
        ):
            return new.replace("*", keys[pattern.index("*")]) if "*" in pattern else new
    return None


def _keys(
    location: tuple[int | str, ...], values: Mapping[str, Any], *, is_missing: bool
) -> list[str]:
    """Return a problem's location without the names of union branches."""
    keys: list[str] = []
    level: Any = values
    for part in location:
        is_key = isinstance(level, Mapping) and part in level
        is_index = isinstance(level, list) and isinstance(part, int)
        if is_key or is_index:
            level = level[part]
        elif not is_missing:
            continue
        keys.append(str(part))
    return keys


def may_be_secret(key: str) -> bool:
    """Whether messages must not show the value of a key."""
    return key.endswith("storage_options") or key == "runtime_env" or is_secret(key)


def _fields_at(location: list[str], model: type[BaseModel]) -> list[str]:
    """Return the names of the fields of the table at a location."""
    for part in location:
        if part not in model.model_fields:
            continue
        models = _models_in(model.model_fields[part].annotation)
        model = models[0] if models else PenaltyConfig
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in a type, the branches of a union, or the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
