"""The folder of one run: whose it is, which attempt works on it, and what it has reached."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from typing import Any

import torch

from gatdist.config import Config, parse_config, require_unchanged
from gatdist.errors import CheckpointError, StaleAttemptError
from gatdist.storage import Store
from gatdist.version import __version__


class RunDirectory:
    """A run directory at any URL, with the contract's files (see the README's map).

    Args:
        store: the folder.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attempt = 0
        self._id = ""

    def require_same(self, config: Config) -> None:
        """Raise ConfigError, with the key and both values, if the run there is another one."""
        old = read_config(self.store)
        if old is not None:
            require_unchanged(old, config, self.store.url)

    def claim(self, config: Config) -> None:
        """Write ``config.json``: from now on the folder belongs to this configuration.

        Raises:
            StorageError: the folder can't be written.
        """
        self.store.publish("config.json", json.dumps(config.public(), indent=1).encode())

    def start_attempt(self, hosts: list[str], resumed_from: int | None, reason: str) -> int:
        """Append this start to ``attempts.jsonl``, which fences all earlier attempts.

        Args:
            hosts: of the workers, by rank.
            resumed_from: samples seen by the checkpoint that this start goes on from.
            reason: why it was needed.

        Returns:
            Its number, from 1.
        """
        earlier = self.attempts()
        self._id = uuid.uuid4().hex
        self.attempt = 1 + max((entry["attempt"] for entry in earlier), default=0)
        entry = {
            "attempt": self.attempt,
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
        lines = [json.dumps(each) + "\n" for each in (*earlier, entry)]
        self.store.publish("attempts.jsonl", "".join(lines).encode())
        return self.attempt

    def require_current(self) -> None:
        """Raise StaleAttemptError if another attempt has taken over this run.

        Two that start at the same moment may take the same number, and only one of them is last in
        the file: the other one is stale.
        """
        latest = self.attempts()[-1:]
        if latest and latest[0].get("id", "") != self._id:
            raise StaleAttemptError(
                f"attempt {self.attempt} on {self.store.url} is stale: attempt "
                f"{latest[0]['attempt']} has taken the run over. This one stops and writes nothing "
                "more"
            )

    def attempts(self) -> list[dict[str, Any]]:
        """All starts, oldest first."""
        return read_lines(self.store, "attempts.jsonl")


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def read_config(store: Store) -> Config | None:
    """The configuration of the run in ``store``; None where there is no ``config.json``.

    Raises:
        CheckpointError: the file is no JSON object.
        ConfigError: it is no configuration.
    """
    if not store.exists("config.json"):
        return None
    try:
        return parse_config(dict(json.loads(store.read("config.json"))))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{store.url}/config.json",
            f"is no JSON object ({error})",
            mend="Restore it, or choose another --run-dir",
        ) from None


def read_lines(store: Store, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; [] where it does not exist.

    A torn line, as a kill leaves it, is left out.
    """
    if not store.exists(name):
        return []
    entries = []
    for line in store.read(name).decode(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries
