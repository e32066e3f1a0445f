"""What a run directory holds, whatever state it is in: in progress, damaged, or all but empty."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from gatdist.common.errors import CheckpointError, GatdistError, StorageError
from gatdist.common.strict_json import parse_json
from gatdist.monitor.charts import ALARMS
from gatdist.monitor.metrics import METRICS_FILE, read_metrics
from gatdist.monitor.numbers import count
from gatdist.runs import Checkpoints, Evaluations
from gatdist.runs.checkpoint import read_manifest
from gatdist.storage import Store

Record = dict[str, Any]
_SIGNS = ("config.json", "attempts.jsonl", "metrics.jsonl")
_FOLDERS = ("profiles", "logs")
_MOST_EVENTS = 200
_ALARMS = {
    "collapse": "fakes vary far less than real samples: the generator collapses",
    "discriminator_won": "the discriminator tells nearly all fakes: it has won",
}


@dataclass
class Findings:
    """What was found of a run.

    Attributes:
        url: of its directory.
        config: the content of ``config.json``; not checked, anybody may have written it.
        attempts: its starts, oldest first.
        ticks: the lines of ``metrics.jsonl`` that can be used.
        state: of the newest checkpoint, without its tensors.
        checkpoints: name, samples and bytes of each.
        samples: names of the files in ``samples/``.
        files: in the folders ``profiles/`` and ``logs/``.
        lacks: what is missing or damaged, for people.
    """

    url: str
    config: Record = field(default_factory=dict)
    attempts: list[Record] = field(default_factory=list)
    ticks: list[Record] = field(default_factory=list)
    state: Record = field(default_factory=dict)
    checkpoints: list[Record] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)

    @property
    def total_samples(self) -> int:
        """Where the run ends; 0 where nobody knows."""
        run = self.config.get("run")
        total = run.get("total_samples") if isinstance(run, dict) else 0
        return total if isinstance(total, int) and total > 0 else 0

    @property
    def samples_seen(self) -> int:
        """By its last tick or checkpoint."""
        clocks = [self.ticks[-1]["samples_seen"]] if self.ticks else []
        return max([*clocks, *(one["samples_seen"] for one in self.checkpoints)], default=0)

    @property
    def status(self) -> str:
        """``finished``, ``converged``, ``interrupted``, ``unfinished`` or ``not begun``."""
        message = self.state.get("status")
        if message in ("finished", "converged", "interrupted"):
            return str(message)
        return "unfinished" if self.samples_seen else "not begun"


def find(store: Store) -> Findings:
    """Read all but the tensors.

    Raises:
        StorageError: this is no run directory.
    """
    if not any(store.exists(name) for name in _SIGNS):
        raise StorageError(
            store.url, f"is no run directory: there is no {' and no '.join(_SIGNS)}",
            hint="Check the URL",
        )  # fmt: skip
    found = Findings(store.url)
    found.config = _config(store, found.lacks)
    found.attempts = _lines(store, "attempts.jsonl", found.lacks)
    found.ticks = _metrics(store, found.lacks)
    found.samples = store.list("samples")
    found.files = [f"{folder}/{name}" for folder in _FOLDERS for name in store.list(folder)]
    if not any(name.startswith("fakes") for name in found.samples):
        found.lacks.append("there are no samples yet")
    _checkpoints(store, found)
    return found


def _config(store: Store, lacks: list[str]) -> Record:
    if not store.exists("config.json"):
        lacks.append("config.json is missing")
        return {}
    try:
        found = parse_json(store.read("config.json"), int64=True)
    except (ValueError, GatdistError):
        found = None
    if not isinstance(found, dict):
        lacks.append("config.json is damaged")
        return {}
    return found


def _lines(store: Store, name: str, lacks: list[str]) -> list[Record]:
    """The objects of a JSON-lines file that can be read."""
    if not store.exists(name):
        lacks.append(f"{name} is missing")
        return []
    found, lost = [], 0
    lines = store.read(name).decode(errors="replace").splitlines()
    for line in filter(None, lines):
        try:
            entry = parse_json(line, int64=True)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        else:
            lost += 1
    if lost:
        lacks.append(f"{count(lost)} of {count(len(lines))} lines of {name} can't be read")
    if not found:
        lacks.append(f"{name} holds nothing yet")
    return found


def _metrics(store: Store, lacks: list[str]) -> list[Record]:
    found = read_metrics(store)
    if not found.exists:
        lacks.append(f"{METRICS_FILE} is missing")
        return []
    if found.num_damaged:
        damaged, total = count(found.num_damaged), count(found.num_lines)
        lacks.append(f"{damaged} of {total} lines of {METRICS_FILE} can't be read")
    if not found.records:
        lacks.append(f"{METRICS_FILE} holds nothing yet")
    return found.records


def _checkpoints(store: Store, found: Findings) -> None:
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
        clock, num_bytes = int(name.partition(".")[0]), sum(e["size"] for e in files.values())
        found.checkpoints.append({"name": name, "samples_seen": clock, "num_bytes": num_bytes})
        try:
            state = parse_json(folder.read(f"{name}/state.json"))
            found.state = evaluations.complete(state) if isinstance(state, dict) else {}
        except (ValueError, GatdistError):
            found.state = {}


@dataclass
class Event:
    """Something that a person should know of a run.

    Attributes:
        what: it was.
        first: samples seen when it was first told.
        last: when it was last told.
        ticks: how often.
    """

    what: str
    first: int
    last: int
    ticks: int = 1


def events(ticks: list[Record]) -> list[Event]:
    """What went wrong, in the order in which it began; alarms of successive ticks are one event."""
    found: list[Event] = []
    open_: dict[str, Event] = {}
    before: Record = {}
    for tick in ticks:
        clock = tick["samples_seen"]
        raised = {t for t, v in tick.items() if re.fullmatch(ALARMS, t) and v}
        raised |= {"health/stragglers"} if tick.get("health/stragglers") else set()
        for tag in raised & open_.keys():
            open_[tag].last, open_[tag].ticks = clock, open_[tag].ticks + 1
        for tag in sorted(raised - open_.keys()):
            open_[tag] = Event(_reported(tag.removeprefix("health/")), clock, clock)
            found.append(open_[tag])
        open_ = {tag: event for tag, event in open_.items() if tag in raised}
        for tag, what in (
            ("health/skipped_steps", "steps moved nobody: bad gradients"),
            ("health/rollbacks", "times back to the last checkpoint"),
            ("health/bad_samples", "bad samples"),
        ):  # fmt: skip
            new = _number(tick.get(tag)) - _number(before.get(tag))
            if new > 0:
                found.append(Event(f"{count(new)} {what}", clock, clock))
        before = tick
    return found[:_MOST_EVENTS]


def _reported(alarm: str) -> str:
    kind, _, player = alarm.partition("_gradient_")
    if player:
        return f"the {player}'s gradient is {kind}"
    return _ALARMS.get(alarm, "a worker holds the others up")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
