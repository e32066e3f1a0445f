"""The folder of one run: its configuration, its attempts, and whose it is."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from gatdist.common.errors import CheckpointError, ConfigError, GatdistError, StaleAttemptError
from gatdist.common.strict_json import parse_json
from gatdist.common.version import __version__
from gatdist.config import (
    Config,
    cache_folder,
    parse_config,
    redact_url,
    require_unchanged,
    set_value,
)
from gatdist.storage import Store
from gatdist.storage.urls import OutsideUrl

CONFIG = "config.json"
_RECORD = "attempts.jsonl"
_ATTEMPTS = "attempts"
_CLAIM = re.compile(r"(\d{6,})\.json", re.ASCII)
# Keys of a configuration that lead elsewhere, or run a program, when a run is evaluated.
# Keys of the section ``data`` that say how samples are read, not where they are.
READING = ("resolution", "resize", "channels", "length", "vocabulary")
_LOCATIONS = (
    ("data", "storage_options"),
    ("data", "shards_url"),
    ("data", "shards_storage_options"),
    ("data", "unpaired"),
    ("evaluate", "url"),
    ("evaluate", "storage_options"),
    ("evaluate", "features_file"),
)


class RunDirectory:
    """A run directory at any URL."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attempt = 0
        self._id = ""
        self._has_committed = False

    def require_same(self, config: Config) -> None:
        old = read_config(self.store)
        if old is not None:
            require_unchanged(old, config, self.store.url)

    def claim(self, config: Config) -> None:
        """Write ``config.json``, which reserves the folder for this configuration."""
        content = json.dumps(config.redacted(), indent=1).encode()
        if not self.store.create(CONFIG, content):
            self.require_same(config)
            self.store.publish(CONFIG, content)

    def start_attempt(
        self,
        hosts: list[str],
        resumed_from: int | None,
        reason: str,
        workers: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Take the next attempt number, from 1, which fences all earlier attempts.

        ``hosts`` and ``workers``, what each runs on, are by rank.

        Creating ``attempts/NUMBER.json`` takes the number; of concurrent starts only one can (see
        :meth:`~gatdist.storage.Store.create`). Then this start is added to ``attempts.jsonl``.
        """
        self._id, has_cuda = uuid.uuid4().hex, torch.cuda.is_available()
        entry = {
            "id": self._id,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "world_size": len(hosts),
            "hosts": hosts,
            "workers": list(workers),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "gatdist": __version__,
            },
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name() if has_cuda else platform.machine(),
            "resumed_from": resumed_from,
            "reason": reason,
        }
        number = 1 + max((*self._taken(), *(e["attempt"] for e in self.attempts())), default=0)
        while not self.store.create(
            _claim(number), json.dumps({"attempt": number} | entry).encode()
        ):
            number += 1
        self.attempt = number
        # Concurrent starts may each have written this file without the others.
        record = {entry["attempt"]: entry for entry in self.attempts()}
        for each in set(self._taken()) - set(record):
            record[each] = self._claimed(each) | {"attempt": each}
        lines = [json.dumps(record[each]) + "\n" for each in sorted(record)]
        self.store.publish(_RECORD, "".join(lines).encode())
        return number

    def require_current(self) -> None:
        """Raise StaleAttemptError if another attempt has taken over this run.

        That is one with a higher number, or, where storage let two take the same number, the one
        whose id the number's file holds.
        """
        newest = max(self._taken(), default=0)
        if newest == self.attempt and (
            not newest or self._claimed(newest).get("id", "") == self._id
        ):
            return
        if newest < self.attempt:
            raise StaleAttemptError(
                f"{self.store.url} has lost {_claim(self.attempt)}, by which this run owns it: it "
                "was deleted, moved or replaced. The run stops and writes nothing more"
            )
        raise StaleAttemptError(
            f"attempt {self.attempt} on {self.store.url} is stale: attempt {newest} has taken the "
            "run over. This one stops and writes nothing more"
        )

    def note_commit(self) -> None:
        if not self._has_committed:
            self.store.publish(_committed(self.attempt), b"")
            self._has_committed = True

    def require_fresh(self) -> None:
        """Raise CheckpointError if the run had a checkpoint, and so must not start from scratch.

        Attempts that ended before their first checkpoint are no reason. For those whose files are
        missing it is unknown.
        """
        starts = self.attempts()
        resumed = [entry.get("resumed_from") for entry in starts]
        resumed = [samples_seen for samples_seen in resumed if samples_seen is not None]
        # Checked by name: an empty or late listing may be why no checkpoint was found.
        recorded = {entry["attempt"] for entry in starts}
        numbers = sorted(recorded | set(self._taken()))
        committed = any(self.store.exists(_committed(each)) for each in numbers)
        if resumed or committed:
            at = f" (the last start resumed at {resumed[-1]} samples)" if resumed else ""
            raise CheckpointError(
                f"{self.store.url}/checkpoints",
                f"holds no complete checkpoint, though this run has committed one{at}",
                hint="Restore one from a copy, or choose another --run-dir to start afresh",
            )
        for each in sorted(recorded):
            if not self.store.exists(_claim(each)):
                raise CheckpointError(
                    f"{self.store.url}/{_claim(each)}",
                    f"is missing, though {_RECORD} lists this attempt, and there is no complete "
                    "checkpoint; whether the run has committed one is unknown",
                    hint="Restore the folders attempts/ and checkpoints/ from a copy, or choose "
                    "another --run-dir to start afresh",
                )

    def attempts(self) -> list[dict[str, Any]]:
        return [
            entry
            for entry in read_lines(self.store, _RECORD)
            if type(entry.get("attempt")) is int and entry["attempt"] > 0
        ]

    def _taken(self) -> list[int]:
        names = map(_CLAIM.fullmatch, self.store.list(_ATTEMPTS))
        return [int(name[1]) for name in names if name]

    def _claimed(self, number: int) -> dict[str, Any]:
        with suppress(ValueError, TypeError):
            return dict(parse_json(self.store.read_if_exists(_claim(number)) or b"{}"))
        return {}


def _committed(number: int) -> str:
    return f"{_ATTEMPTS}/{number:06d}.committed"


def _claim(number: int) -> str:
    return f"{_ATTEMPTS}/{number:06d}.json"


def read_config(store: Store) -> Config | None:
    """Return the configuration of the run in ``store``; None without ``config.json``."""
    content = store.read_if_exists(CONFIG)
    if content is None:
        return None
    try:
        return parse_config(dict(parse_json(content)))
    except (ValueError, TypeError) as error:
        rule, hint = f"is not a JSON object ({error})", "Restore it, or choose another --run-dir"
        raise CheckpointError(f"{store.url}/{CONFIG}", rule, hint=hint) from None


def read_lines(store: Store, name: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, without damaged lines; [] if it does not exist."""
    return parse_lines(store.read_if_exists(name) or b"")[0]


def parse_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of JSON lines, and the number of damaged lines."""
    entries = []
    lines = [line for line in content.decode(errors="replace").splitlines() if line]
    for line in lines:
        with suppress(ValueError):
            entry = parse_json(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries, len(lines) - len(entries)


def remember(config: Config) -> None:
    """Record the configuration as the user's own, if the cache folder is writable."""
    with suppress(GatdistError):
        store, digest = _own_record(config)
        if not store.exists(digest):
            store.publish(digest, b"")


def adopted(
    config: Config, overrides: Sequence[str], run: Store, against: str | None = None
) -> Config:
    """Return a run's configuration for evaluation, as far as it can be trusted.

    With ``against``, that URL replaces the data. It is read with the same resolution, channels
    and so on.

    A configuration names URLs, with references to the environment, and programs. It is the user's
    own if a run with it was trained here: its digest is in the user's cache folder. Of somebody
    else's, only data next to the run and the user's ``overrides`` (``section.key=value``) are used;
    what else it names raises ConfigError, whose hint says how to allow it.
    """
    values = config.model_dump(mode="json")
    given: dict[str, Any] = {}
    if against is not None:
        values["data"] = {key: values["data"][key] for key in READING}
    for override in overrides:
        set_value(given, override)
        set_value(values, override)
    if against is not None:
        for each in (given, values):
            if isinstance(each.setdefault("data", {}), dict):  # else an error below
                each["data"]["url"] = against
    if not _is_own(config):
        if "url" not in _table(given, "data") and not config.data.url.startswith("builtin:"):
            try:
                run.reach(OutsideUrl(config.data.url))
            except ValueError:
                raise _refused(run, "data.url", config.data.url) from None
        for section, key in _LOCATIONS:
            if key not in _table(given, section) and _table(values, section).get(key):
                raise _refused(run, f"{section}.{key}", values[section][key])
        if "cache_dir" not in _table(given, "data"):
            _table(values, "data")["cache_dir"] = None
    return parse_config(values)


def _table(values: dict[str, Any], section: str) -> dict[str, Any]:
    """Return a section; {} if it is missing or, which is an error later, a value."""
    found = values.get(section)
    return found if isinstance(found, dict) else {}


def _refused(run: Store, key: str, value: object) -> ConfigError:
    shown, quoted = "{…}", "{…}"
    if isinstance(value, str):
        shown = redact_url(value)
        quoted = json.dumps(shown)
    return ConfigError(
        f"{run.url}/{CONFIG}: {key}",
        "may be named only by your own configuration, and this run was not trained by you here",
        value=shown,
        hint=f"If you trust it: --set '{key}={quoted}'",
    )


def _is_own(config: Config) -> bool:
    with suppress(GatdistError):
        store, digest = _own_record(config)
        return store.exists(digest)
    return False


def _own_record(config: Config) -> tuple[Store, str]:
    content = json.dumps(config.redacted(), sort_keys=True).encode()
    return Store(str(cache_folder() / "own")), hashlib.sha256(content).hexdigest()
