"""Long phases send heartbeats, so that they are not mistaken for hangs."""

from __future__ import annotations

import threading

import pytest
import torch

from gatdist.common.heartbeat import beat, beats, watch_this_thread
from gatdist.evaluation import distances, neighbors, text
from gatdist.evaluation.distances import split_half_distance
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.storage import Store
from gatdist.training.progress import Progress

COMM = LocalCommunicator(torch.device("cpu"))
X = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))


def test_only_heartbeats_of_the_training_thread_count():
    watch_this_thread()
    before = beats()
    other = threading.Thread(target=beat)
    other.start()
    other.join()
    assert beats() == before
    beat()
    assert beats() == before + 1


@pytest.mark.parametrize(
    "phase",
    [
        lambda: distances.self_similarity(X, COMM),
        lambda: neighbors.radii(X, 3, COMM),
        lambda: split_half_distance(X),
        lambda: text.self_bleu(["one text", "another text", "a third"]),
        lambda: Store("memory://heartbeats").publish("file", b"x"),
    ],
    ids=["kernel", "neighbors", "frechet", "texts", "storage"],
)
def test_long_phase_sends_heartbeats(phase):
    watch_this_thread()
    before = beats()
    phase()
    assert beats() > before


def test_heartbeat_resets_the_idle_time():
    progress = Progress()
    progress.report()
    progress._last_at -= 100
    assert progress.report()["still_s"] >= 100
    beat()
    assert progress.report()["still_s"] < 50


def test_start_is_a_long_phase_until_the_first_step_ends():
    progress = Progress()
    progress.start(640)
    assert progress.report()["lengthy"]
    assert progress.report()["is_saved"]
    progress.step(704)
    assert not progress.report()["lengthy"]
    assert not progress.report()["is_saved"]
    progress.saved_samples = 704
    assert progress.report()["is_saved"]
    with progress.lengthy():
        assert progress.report()["lengthy"]
    assert not progress.report()["lengthy"]


def test_compilation_is_a_long_phase():
    progress = Progress()
    progress.step(1)
    seen = []

    def backend(graph, inputs):
        seen.append(progress.report()["lengthy"])
        return graph.forward

    with progress.compiling():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        assert not progress.report()["lengthy"]
    assert seen == [True]
