"""Checkpoints are written before they are evaluated; after a resume, results are the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gatdist.common.errors import ConfigError, StorageError
from gatdist.config import load_config
from gatdist.evaluation import Evaluator, metrics
from gatdist.monitor.metrics import read_metrics
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, Evaluations
from gatdist.runs.inspection import digest, inspect
from gatdist.runs.report import report
from gatdist.storage import Store
from gatdist.training.loop import run
from gatdist.training.plan import check
from support import refused

LOCAL = LocalCommunicator(torch.device("cpu"))
SETTINGS = [
    "run.total_samples=1024",
    "run.global_batch=64",
    "run.log_every_samples=256",
    "run.checkpoint_every_samples=256",
    "run.keep_checkpoints=1",
    "run.keep_best_checkpoints=1",
    "evaluate.every_samples=256",
    "evaluate.num_samples=256",
    "model.generator.depth=1",
    "model.discriminator.depth=1",
    'evaluate.metrics=["fid"]',
    "monitor.tensorboard=false",
]


class Killed(KeyboardInterrupt):
    """Ends a run during an evaluation, which records nothing."""


@contextmanager
def killed_in(number: int) -> Iterator[None]:
    """Return an evaluator whose evaluation of this number, from 1, ends the run."""
    calls, call = itertools.count(1), Evaluator.__call__

    def counted(self: Evaluator, *args: Any) -> Any:
        if next(calls) == number:
            raise Killed
        return call(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "__call__", counted)
        with pytest.raises(Killed):
            yield


def train(store: Store, *more: str) -> dict[str, Any]:
    return run(load_config("ring", [*SETTINGS, *more]), LOCAL, store)


def known(store: Store) -> dict[str, Any]:
    """Return what a run's checkpoints, metrics and page contain, without times and names."""
    checkpoint = inspect(store.url)["checkpoint"]
    return {
        "digest": digest(store.url),
        "state": [checkpoint[key] for key in ("samples_seen", "status", "reason", "metrics")],
        "on the page": f'<b class="{checkpoint["status"]}">' in report(store.url)[0],
        "kept": [n.partition(".")[0] for n in Checkpoints(store.child("checkpoints")).committed()],
        "measured": [
            (tick["samples_seen"], tick.get("metric/fid")) for tick in read_metrics(store).records
        ],
    }


CONVERGES = 'run.convergence={metric="fid", min_improvement=0.99, patience_samples=256}'


@pytest.mark.parametrize(
    ("more", "status", "number"),
    [((), "finished", n) for n in (2, 4)] + [((CONVERGES,), "converged", 2)],
)
def test_run_interrupted_in_an_evaluation_and_resumed_equals_an_undisturbed_run(
    more: tuple[str, ...], status: str, number: int, tmp_path: Path
) -> None:
    whole, ended = Store(str(tmp_path / "whole")), Store(str(tmp_path / "ended"))
    expected = train(whole, *more)
    assert expected["status"] == status
    with killed_in(number):
        train(ended, *more)
    assert inspect(ended.url)["checkpoint"]["status"] == "running"
    assert '<b class="unfinished">' in report(ended.url)[0]
    assert train(ended, *more) == expected
    assert known(ended) == known(whole)
    assert known(ended)["on the page"]
    assert known(ended)["state"][1:] == [status, expected["reason"], expected["metrics"]]
    before = known(ended), ended.read("attempts.jsonl")
    assert train(ended, *more) == expected  # everything is done
    assert (known(ended), ended.read("attempts.jsonl")) == before


def test_unreadable_evaluations_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    outcome = {"status": "running", "reason": "", "metrics": {"fid": 1.0}, "convergence": {}}
    Evaluations(store).record({"samples_seen": 64, "attempt": 1}, outcome)

    def refuses(name: str) -> bytes:
        raise StorageError(name, "is not for you")

    again = Evaluations(store)
    with monkeypatch.context() as patch:
        patch.setattr(store, "read_if_exists", refuses)
        with pytest.raises(StorageError):
            again.record({"samples_seen": 128, "attempt": 1}, outcome)
    again.record({"samples_seen": 128, "attempt": 1}, outcome)
    assert Evaluations(store).metrics(64, 1) == {"fid": 1.0}


BEST = ["run.keep_best_checkpoints=1", "run.best_metric={name}"]
CONVERGENCE = ["run.convergence={{metric='{name}', patience_samples=99}}"]


@pytest.mark.parametrize(
    ("key", "given"), [("run.best_metric", BEST), ("run.convergence.metric", CONVERGENCE)]
)
def test_only_metrics_with_a_value_of_their_own_name_rank_checkpoints(
    key: str, given: list[str], tmp_path: Path
) -> None:
    for name in ("precision_recall", "density_coverage", "fid"):
        more = [f'evaluate.metrics=["{name}"]', *(each.format(name=name) for each in given)]
        config = load_config("ring", [*SETTINGS[:4], *SETTINGS[6:], *more])
        if name == "fid":
            check(config, str(tmp_path / "run"))
            continue
        with refused(ConfigError, key) as caught:
            check(config, str(tmp_path / "run"))
        assert "fid, " in str(caught.value)
        assert name not in str(caught.value).partition(": ")[2]
    assert {name for name in metrics.names() if not metrics[name].is_ranked} == {
        *("precision_recall", "density_coverage", "novelty")
    }
