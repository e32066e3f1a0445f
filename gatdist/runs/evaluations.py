"""What was measured of a run's checkpoints, which are written before they are evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gatdist.common.errors import CheckpointError
from gatdist.common.strict_json import parse_json
from gatdist.runs.saved_state import require_saved_state
from gatdist.storage import Store

_FILE = "evaluations.json"
# What an evaluation changes in a checkpoint's ``state.json``.
_KEYS = ("status", "reason", "metrics", "convergence")


class Evaluations:
    """The file ``evaluations.json`` of a run directory: one entry for each evaluated checkpoint.

    A checkpoint at which the run evaluates is written first, with the values of its log interval
    under ``evaluating`` in its ``state.json``. A run that was ended before the evaluation was
    recorded here does it again when it resumes, so that results do not depend on interruptions.

    Args:
        store: the run directory.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: dict[str, Any] | None = None

    def record(self, state: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        """Record what the evaluation of the checkpoint with this state has come to."""
        entries = self._known() | {_key(state): {name: outcome[name] for name in _KEYS}}
        self._store.publish(_FILE, json.dumps(entries, indent=1).encode())
        self._entries = entries

    def complete(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a checkpoint, completed by its evaluation if that was recorded.

        ``evaluating`` is absent in what is returned, unless the evaluation is still to be done.
        """
        if state.get("evaluating") is None:
            return state
        entry = self._known().get(_key(state))
        if not isinstance(entry, dict) or any(name not in entry for name in _KEYS):
            return state
        completed = state | {name: entry[name] for name in _KEYS} | {"evaluating": None}
        try:
            require_saved_state(completed, _FILE)
        except CheckpointError:
            return state  # it is evaluated again
        return completed

    def metrics(self, samples_seen: int, attempt: int) -> Mapping[str, Any]:
        """What was measured of the checkpoint that an attempt wrote; {} if nothing was."""
        for key, entry in self._known().items():
            if key.startswith(f"{samples_seen}/{attempt}/") and isinstance(entry, dict):
                found = entry.get("metrics")
                return found if isinstance(found, dict) else {}
        return {}

    def _known(self) -> dict[str, Any]:
        if self._entries is None:
            self._entries = _read(self._store)
        return self._entries


def _key(state: Mapping[str, Any]) -> str:
    """What no two different states of a run have in common."""
    return f"{state.get('samples_seen')}/{state.get('attempt', 0)}/{state.get('rollbacks', 0)}"


def _read(store: Store) -> dict[str, Any]:
    """The file's entries; {} where it is absent or damaged: then evaluations are done again."""
    data = store.read_if_exists(_FILE)
    try:
        found = parse_json(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
