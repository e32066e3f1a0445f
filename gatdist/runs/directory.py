"""The folder of one run: whose it is, which attempt works on it, and what it has reached."""

from __future__ import annotations

import json
import os
import platform
import re
import time
import uuid
from contextlib import suppress
from typing import Any

import torch

from gatdist.common.errors import CheckpointError, StaleAttemptError
from gatdist.common.strict_json import parse_json
from gatdist.common.version import __version__
from gatdist.config import Config, parse_config, require_unchanged
from gatdist.storage import Store

_CONFIG = "config.json"
_RECORD = "attempts.jsonl"
_ATTEMPTS = "attempts"
_CLAIM = re.compile(r"(\d{6,})\.json", re.ASCII)


class RunDirectory:
    """A run directory at any URL, with the contract's files (see the README's map).

    Args:
        store: the folder.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attempt = 0
        self._id = ""
        self._has_committed = False

    def require_same(self, config: Config) -> None:
        """Raise ConfigError, with the key and both values, if the run there is another one."""
        old = read_config(self.store)
        if old is not None:
            require_unchanged(old, config, self.store.url)

    def claim(self, config: Config) -> None:
        """Write ``config.json``: from now on the folder belongs to this configuration.

        Raises:
            ConfigError: a start at the same instant has claimed it for another one.
            StorageError: the folder can't be written.
        """
        content = json.dumps(config.redacted(), indent=1).encode()
        if not self.store.create(_CONFIG, content):
            self.require_same(config)
            self.store.publish(_CONFIG, content)

    def start_attempt(self, hosts: list[str], resumed_from: int | None, reason: str) -> int:
        """Take the next attempt number, which fences all earlier attempts.

        The number is taken by creating ``attempts/NUMBER.json``, which only one of several starts
        at the same instant can (see :meth:`~gatdist.storage.Store.create`); then this start is
        added to ``attempts.jsonl``.

        Args:
            hosts: of the workers, by rank.
            resumed_from: samples seen by the checkpoint that this start goes on from.
            reason: why it was needed.

        Returns:
            Its number, from 1.
        """
        self._id = uuid.uuid4().hex
        entry = {
            "id": self._id,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "world_size": len(hosts),
            "hosts": hosts,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "gatdist": __version__,
            },
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": _device(),
            "resumed_from": resumed_from,
            "reason": reason,
        }
        number = 1 + max((*self._taken(), *(e["attempt"] for e in self.attempts())), default=0)
        while not self.store.create(
            _claim(number), json.dumps({"attempt": number} | entry).encode()
        ):
            number += 1
        self.attempt = number
        # Of starts at the same instant, each may have written this file without the others.
        record = {entry["attempt"]: entry for entry in self.attempts()}
        for each in set(self._taken()) - set(record):
            record[each] = self._claimed(each) | {"attempt": each}
        lines = [json.dumps(record[each]) + "\n" for each in sorted(record)]
        self.store.publish(_RECORD, "".join(lines).encode())
        return number

    def require_current(self) -> None:
        """Raise StaleAttemptError if another attempt has taken over this run.

        That is one with a higher number, or, where storage could not keep two from taking the same
        number, the one whose name the number holds.
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
        """Record, once an attempt, that it has committed a checkpoint."""
        if not self._has_committed:
            self.store.publish(_committed(self.attempt), b"")
            self._has_committed = True

    def require_fresh(self) -> None:
        """Raise CheckpointError if the run had a checkpoint: it must not start afresh without.

        Attempts that ended before their first checkpoint are no reason. Of those whose files are
        gone nobody knows whether they had one.
        """
        starts = self.attempts()
        resumed = [entry["resumed_from"] for entry in starts if "resumed_from" in entry]
        resumed = [samples_seen for samples_seen in resumed if samples_seen is not None]
        # Asked for by name: a listing that is empty, or late, may be why no checkpoint was found.
        recorded = {entry["attempt"] for entry in starts}
        numbers = sorted(recorded | set(self._taken()))
        committed = any(self.store.exists(_committed(each)) for each in numbers)
        if resumed or committed:
            at = f" (the last start went on from {resumed[-1]} samples)" if resumed else ""
            raise CheckpointError(
                f"{self.store.url}/checkpoints",
                f"holds no whole checkpoint, though this run has committed one{at}",
                hint="Restore one from a copy, or choose another --run-dir to start afresh",
            )
        for each in sorted(recorded):
            if not self.store.exists(_claim(each)):
                raise CheckpointError(
                    f"{self.store.url}/{_claim(each)}",
                    f"is lost, though {_RECORD} names this attempt, and there is no whole "
                    "checkpoint; whether the run has committed one is not known",
                    hint="Restore the folders attempts/ and checkpoints/ from a copy, or choose "
                    "another --run-dir to start afresh",
                )

    def attempts(self) -> list[dict[str, Any]]:
        """All starts, oldest first."""
        return [
            entry
            for entry in read_lines(self.store, _RECORD)
            if type(entry.get("attempt")) is int and entry["attempt"] > 0
        ]

    def _taken(self) -> list[int]:
        """Attempt numbers that are taken."""
        names = map(_CLAIM.fullmatch, self.store.list(_ATTEMPTS))
        return [int(name[1]) for name in names if name]

    def _claimed(self, number: int) -> dict[str, Any]:
        """What the attempt with this number has said of itself."""
        with suppress(ValueError, TypeError):
            return dict(parse_json(self.store.read_if_exists(_claim(number)) or b"{}"))
        return {}


def _committed(number: int) -> str:
    return f"{_ATTEMPTS}/{number:06d}.committed"


def _claim(number: int) -> str:
    return f"{_ATTEMPTS}/{number:06d}.json"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def read_config(store: Store) -> Config | None:
    """The configuration of the run in ``store``; None where there is no ``config.json``.

    Raises:
        CheckpointError: the file is no JSON object.
        ConfigError: it is no configuration.
    """
    content = store.read_if_exists("config.json")
    if content is None:
        return None
    try:
        return parse_config(dict(parse_json(content)))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{store.url}/config.json",
            f"is no JSON object ({error})",
            hint="Restore it, or choose another --run-dir",
        ) from None


def read_lines(store: Store, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; [] where it does not exist.

    A torn line, as a kill leaves it, is left out.
    """
    entries = []
    for line in (store.read_if_exists(name) or b"").decode(errors="replace").splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries
