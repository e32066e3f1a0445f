"""Description and verification of a run, a checkpoint or a data set at a URL."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gatdist.common.errors import CheckpointError, StorageError
from gatdist.data.format.manifest import read_manifest as manifest_of_data
from gatdist.monitor.metrics import read_metrics
from gatdist.runs.changes import Change, read_changes, table
from gatdist.runs.checkpoint import MANIFEST, Checkpoint, read_checkpoint
from gatdist.runs.checkpoints import Checkpoints
from gatdist.runs.directory import RunDirectory, read_config
from gatdist.runs.state import Evaluations
from gatdist.storage import Store


def inspect(url: str) -> dict[str, Any]:
    """Describe a run, checkpoint or data set (``kind``) as JSON values."""
    store = Store(url)
    if store.exists("config.json"):
        return _run(store)
    if store.exists(MANIFEST):
        return {"kind": "checkpoint", "url": store.url} | _checkpoint(read_checkpoint(store))
    if store.exists("manifest.json"):
        shown = manifest_of_data(store).model_dump(mode="json")
        return {"kind": "dataset", "url": store.url, "num_shards": len(shown.pop("shards"))} | shown
    raise StorageError(store.url, "holds no run, checkpoint or data set", hint="Check the URL")


def digest(url: str) -> str:
    """Return a SHA-256 (hex) of all trained state of a checkpoint, or of a run's newest one."""
    store = Store(url)
    if store.exists(MANIFEST):
        return read_checkpoint(store).digest()
    is_run = store.exists("config.json")
    newest = Checkpoints(store.child("checkpoints")).newest() if is_run else None
    if newest is None:
        hint = "Check the URL, or let the run reach its first one"
        raise StorageError(store.url, "holds no checkpoint", hint=hint)
    return newest.digest()


def damaged_checkpoints(store: Store) -> dict[str, Any]:
    """Verify the digests of a checkpoint, or of all of a run; raise StorageError without either.

    Returns ``kind``, ``checkpoints`` (their number) and ``damaged``: [URL, message] of each.
    """
    if store.exists(MANIFEST):
        kind, found = "checkpoint", [store]
    elif store.exists("config.json"):
        folder = store.child("checkpoints")
        kind, found = "run", [folder.child(name) for name in Checkpoints(folder).committed()]
    else:
        raise StorageError(store.url, "holds no data set, run or checkpoint", hint="Check the URL")
    damaged = []
    for one in found:
        try:
            read_checkpoint(one)
        except CheckpointError as error:
            damaged.append([one.url, str(error)])
    if not found:
        try:
            RunDirectory(store).require_fresh()
        except CheckpointError as error:  # all are missing
            damaged.append([folder.url, str(error)])
    return {"kind": kind, "checkpoints": len(found), "damaged": damaged}


def describe(found: dict[str, Any]) -> str:
    """Format the result of :func:`inspect` as text, without the CPUs of each worker.

    Of the changes of workers, it shows the last ones.
    """
    attempt = found.get("last_attempt")
    if isinstance(attempt, dict):
        shown = {key: value for key, value in attempt.items() if key != "workers"}
        found = found | {"last_attempt": shown}
    if changes := found.get("worker_changes"):
        found = found | {"worker_changes": table([Change(**each) for each in changes])}
    width = max(len(key) for key in found) + 2
    return "\n".join(
        f"{key:<{width}}{_text(value)}"
        for key, value in found.items()
        if value not in (None, False, {}, [])
    )


def _run(store: Store) -> dict[str, Any]:
    config = read_config(store)
    assert config is not None
    damaged: list[str] = []
    newest = Checkpoints(store.child("checkpoints"), on_damaged=damaged.append).newest()
    attempts = RunDirectory(store).attempts()
    logs = read_metrics(store).records
    return {
        "kind": "run",
        "url": store.url,
        "data": config.data.url,
        "generator": config.model.generator.name,
        "discriminator": config.model.discriminator.name,
        "loss": config.game.loss,
        "update_rule": config.game.update_rule,
        "total_samples": config.run.total_samples,
        "attempts": len(attempts),
        "last_attempt": attempts[-1] if attempts else None,
        "worker_changes": [asdict(each) for each in read_changes(store)],
        "last_log": logs[-1] if logs else None,
        "damaged": damaged,
        "checkpoint": {"name": newest.name} | _checkpoint(newest, store) if newest else None,
    }


def _checkpoint(checkpoint: Checkpoint, run: Store | None = None) -> dict[str, Any]:
    keys = ("samples_seen", "status", "reason", "metrics", "wall_time_s")
    state = Evaluations(run).complete(checkpoint.state) if run else checkpoint.state
    return {key: state.get(key) for key in keys} | {
        "num_tensors": len(checkpoint.tensors),
        "num_bytes": sum(t.numel() * t.element_size() for t in checkpoint.tensors.values()),
        "digest": checkpoint.digest(),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n" + "\n".join(f"    {key:<32} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
