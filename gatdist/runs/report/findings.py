"""What a run directory contains, in whatever state it is: in progress, damaged, or almost empty."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gatdist.common.errors import CheckpointError, GatdistError, StorageError
from gatdist.common.strict_json import parse_json
from gatdist.monitor.metrics import METRICS_FILE, read_metrics
from gatdist.monitor.numbers import count
from gatdist.monitor.tags import ALARMS
from gatdist.runs import Checkpoints, Evaluations
from gatdist.runs.changes import Change, read_changes
from gatdist.runs.checkpoint import read_manifest
from gatdist.runs.directory import parse_lines
from gatdist.storage import Store

Record = dict[str, Any]
_ATTEMPTS_FILE = "attempts.jsonl"
_RUN_FILES = ("config.json", _ATTEMPTS_FILE, METRICS_FILE)
_FOLDERS = ("profiles", "logs")
_MAX_EVENTS = 200
_ALARMS = {
    "collapse": "mode collapse: generated samples vary far less than real ones",
    "discriminator_won": "the discriminator separates nearly all samples: it has won",
}
_COUNTERS = {
    "health/skipped_steps": "steps skipped on every rank: non-finite gradients",
    "health/rollbacks": "rollbacks to the last checkpoint",
    "health/bad_samples": "bad samples",
    "workers/changes": "changes of workers",
}


@dataclass
class Findings:
    """The content of a run directory."""

    url: str
    config: Record = field(default_factory=dict)  # unchecked
    attempts: list[Record] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)  # of workers
    logs: list[Record] = field(default_factory=list)  # the valid lines of metrics.jsonl
    state: Record = field(default_factory=dict)  # of the newest checkpoint
    checkpoints: list[Record] = field(default_factory=list)  # name, samples_seen, num_bytes
    samples: list[str] = field(default_factory=list)  # names of files
    files: list[str] = field(default_factory=list)  # in profiles/ and logs/
    lacks: list[str] = field(default_factory=list)  # messages of what is missing or damaged

    @property
    def total_samples(self) -> int:
        """``run.total_samples``; 0 if unknown."""
        run = self.config.get("run")
        total = run.get("total_samples") if isinstance(run, dict) else 0
        return total if isinstance(total, int) and total > 0 else 0

    @property
    def samples_seen(self) -> int:
        """By the last log or checkpoint."""
        seen = [self.logs[-1]["samples_seen"]] if self.logs else []
        return max([*seen, *(one["samples_seen"] for one in self.checkpoints)], default=0)

    @property
    def status(self) -> str:
        """``finished``, ``converged``, ``interrupted``, ``unfinished`` or ``not begun``."""
        status = self.state.get("status")
        if status in ("finished", "converged", "interrupted"):
            return str(status)
        return "unfinished" if self.samples_seen else "not begun"


def find(store: Store) -> Findings:
    """Read everything but the tensors; raise StorageError if this is not a run directory."""
    if not any(store.exists(name) for name in _RUN_FILES):
        rule = f"is not a run directory: it has no {' and no '.join(_RUN_FILES)}"
        raise StorageError(store.url, rule, hint="Check the URL")
    found = Findings(store.url)
    found.config = _config(store, found.lacks)
    content = store.read_if_exists(_ATTEMPTS_FILE)
    found.attempts, num_damaged = parse_lines(content or b"")
    _note_lines(found, _ATTEMPTS_FILE, content is not None, found.attempts, num_damaged)
    found.changes = read_changes(store)
    metrics = read_metrics(store)
    found.logs = metrics.records
    _note_lines(found, METRICS_FILE, metrics.exists, found.logs, metrics.num_damaged)
    found.samples = store.list("samples")
    found.files = [f"{folder}/{name}" for folder in _FOLDERS for name in store.list(folder)]
    if not any(name.startswith("fakes") for name in found.samples):
        found.lacks.append("there are no samples yet")
    _find_checkpoints(store, found)
    return found


def _config(store: Store, lacks: list[str]) -> Record:
    if not store.exists("config.json"):
        lacks.append("config.json is missing")
        return {}
    with suppress(ValueError, GatdistError):
        found = parse_json(store.read("config.json"))
        if isinstance(found, dict):
            return found
    lacks.append("config.json is damaged")
    return {}


def _note_lines(
    found: Findings, file: str, exists: bool, records: list[Record], num_damaged: int
) -> None:
    if not exists:
        found.lacks.append(f"{file} is missing")
        return
    if num_damaged:
        total = count(num_damaged + len(records))
        found.lacks.append(f"{count(num_damaged)} of {total} lines of {file} are damaged")
    if not records:
        found.lacks.append(f"{file} is empty")


def _find_checkpoints(store: Store, found: Findings) -> None:
    folder = store.child("checkpoints")
    names = Checkpoints(folder).committed()
    if not names:
        found.lacks.append("there is no checkpoint yet")
    sizes, evaluations = folder.find(), Evaluations(store)
    for name in names:
        try:
            files = read_manifest(folder.child(name))["files"]
        except CheckpointError as error:
            found.lacks.append(str(error))
            continue
        wrong = [
            file
            for file, entry in files.items()
            if sizes.get(f"{name}/{file}", -1) not in (entry["size"], None)
        ]
        if wrong:
            found.lacks.append(f"checkpoint {name} is damaged: {', '.join(sorted(wrong))}")
        seen, num_bytes = int(name.partition(".")[0]), sum(e["size"] for e in files.values())
        found.checkpoints.append({"name": name, "samples_seen": seen, "num_bytes": num_bytes})
        try:
            state = parse_json(folder.read(f"{name}/state.json"))
            found.state = evaluations.complete(state) if isinstance(state, dict) else {}
        except (ValueError, GatdistError):
            found.state = {}


@dataclass
class Event:
    """A problem of a run: ``logs`` log intervals, from ``samples_seen`` first to last."""

    what: str
    first: int
    last: int
    logs: int = 1


def events(logs: list[Record]) -> list[Event]:
    """Return problems by their beginning; alarms of successive logs are one event."""
    found: list[Event] = []
    active: dict[str, Event] = {}
    before: Record = {}
    for log in logs:
        seen = log["samples_seen"]
        raised = {t for t, v in log.items() if re.fullmatch(ALARMS, t) and v}
        raised |= {"health/stragglers"} if log.get("health/stragglers") else set()
        for tag in raised & active.keys():
            active[tag].last, active[tag].logs = seen, active[tag].logs + 1
        for tag in sorted(raised - active.keys()):
            active[tag] = Event(_described(tag.removeprefix("health/")), seen, seen)
            found.append(active[tag])
        active = {tag: event for tag, event in active.items() if tag in raised}
        for tag, what in _COUNTERS.items():
            new = _number(log.get(tag)) - _number(before.get(tag))
            if new > 0:
                found.append(Event(f"{count(new)} {what}", seen, seen))
        before = log
    return found[:_MAX_EVENTS]


def _described(alarm: str) -> str:
    kind, _, player = alarm.partition("_gradient_")
    if player:
        return f"the {player}'s gradient is {kind}"
    return _ALARMS.get(alarm, "a worker is a straggler")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
