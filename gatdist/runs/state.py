"""``state.json`` of a checkpoint, and ``evaluations.json`` of its run, which completes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gatdist.common.errors import CheckpointError
from gatdist.common.registry import validation_problem
from gatdist.common.strict_json import parse_json
from gatdist.storage import Store

_EVALUATIONS = "evaluations.json"
# The keys of a checkpoint's state that its evaluation changes.
_EVALUATED = ("status", "reason", "metrics", "convergence")
_Count = Annotated[int, Field(ge=0, le=2**62)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Evaluating(_Strict):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    samples_seen: _Count


class _Order(_Strict):
    fingerprint: str


class _Convergence(_Strict):
    best: Annotated[float, Field(allow_inf_nan=False)] | None
    best_samples: _Count


class _Counted(_Strict):
    model_config = ConfigDict(extra="forbid")

    nonfinite: _Count
    spikes: _Count
    rollbacks: _Count


class _SavedState(_Strict):
    status: str
    reason: str
    samples_seen: _Count
    metrics: dict[str, Any]
    attempt: _Count
    evaluating: _Evaluating | None
    order: _Order
    samples: dict[str, Any]
    wall_time_s: _Seconds
    convergence: _Convergence
    rollbacks: _Count
    counted: _Counted
    checkpoint_every_samples: Annotated[int, Field(gt=0, le=2**62)] | None = None
    unwritten_metrics: list[dict[str, Any]] = []


def require_saved_state(
    state: Mapping[str, Any], subject: str, named_samples: int | None = None
) -> None:
    """Raise CheckpointError for a state that training can't have written, with the first bad key.

    ``named_samples`` is ``samples_seen`` in the folder's name, if known.
    """
    try:
        _SavedState.model_validate(dict(state))
    except ValidationError as error:
        key, rule, _ = validation_problem(error)
        hint = "Another version of gatdist wrote it, or it was edited: choose another --run-dir"
        raise CheckpointError(f"{subject}: {key}", rule, hint=hint) from None
    if named_samples not in (None, state["samples_seen"]):
        raise CheckpointError(
            f"{subject}: samples_seen",
            f"differs from the name of its folder, {named_samples}",
            value=state["samples_seen"],
            hint="Restore the folder's name",
        )


class Evaluations:
    """The file ``evaluations.json`` of a run directory: one entry per evaluated checkpoint.

    A checkpoint at which the run evaluates is written before, with its log values under
    ``evaluating`` in ``state.json``. If the run ends before the evaluation is recorded here, it is
    repeated on resume, so that results do not depend on interruptions.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: dict[str, Any] | None = None

    def record(self, state: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        entries = self._known() | {_key(state): {name: outcome[name] for name in _EVALUATED}}
        self._store.publish(_EVALUATIONS, json.dumps(entries, indent=1).encode())
        self._entries = entries

    def complete(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's state with its evaluation, if recorded.

        ``evaluating`` is None in the result unless the evaluation is still to be done.
        """
        if state.get("evaluating") is None:
            return state
        entry = self._known().get(_key(state))
        if not isinstance(entry, dict) or any(name not in entry for name in _EVALUATED):
            return state
        completed = state | {name: entry[name] for name in _EVALUATED} | {"evaluating": None}
        try:
            require_saved_state(completed, _EVALUATIONS)
        except CheckpointError:
            return state  # it is evaluated again
        return completed

    def metrics(self, samples_seen: int, attempt: int) -> Mapping[str, Any]:
        """Return the metrics of the checkpoint that an attempt wrote; {} without."""
        for key, entry in self._known().items():
            if key.startswith(f"{samples_seen}/{attempt}/") and isinstance(entry, dict):
                found = entry.get("metrics")
                return found if isinstance(found, dict) else {}
        return {}

    def _known(self) -> dict[str, Any]:
        """Return the entries; {} if the file is absent or damaged, so that evaluations repeat."""
        if self._entries is None:
            try:
                found = parse_json(self._store.read_if_exists(_EVALUATIONS) or b"{}")
            except ValueError:
                found = {}
            self._entries = found if isinstance(found, dict) else {}
        return self._entries


def _key(state: Mapping[str, Any]) -> str:
    return f"{state.get('samples_seen')}/{state.get('attempt', 0)}/{state.get('rollbacks', 0)}"
