"""gatdist's own step, by rule and precision: the same function that training calls."""

from __future__ import annotations

import torch

from gatdist.bench.case import BFLOAT16, Case, Overrides, Size
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import Communicator, LocalCommunicator
from gatdist.parallel.recording import Recorder
from gatdist.training.graphs import StepGraphs
from gatdist.training.state import TrainState
from gatdist.training.step import train_step


def _rule(name: str, **more: object) -> Overrides:
    return {"game": {"update_rule": name, "latents": "shared", **more}}


RULES: dict[str, Overrides] = {
    "alternating": _rule("alternating"),
    "alternating_atomic": _rule("alternating") | {"health": {"atomic": True}},
    "alternating_kept": _rule("alternating", reuse_fakes=True),
    "alternating_kept_bfloat16": _rule("alternating", reuse_fakes=True) | BFLOAT16,
    "alternating_bfloat16": _rule("alternating") | BFLOAT16,
    "canonical": _rule("alternating") | {"run": {"reduction": "canonical", "virtual_workers": 2}},
    "simultaneous": _rule("simultaneous"),
    "one_stage": _rule("one_stage"),
    "one_stage_bfloat16": _rule("one_stage") | BFLOAT16,
    "extragradient": _rule("extragradient"),
    "optimistic": _rule("optimistic"),
}


class GatdistCase(Case):
    """gatdist: latents by position, guard, average and statistics included.

    Args:
        size: of the networks and the batch.
        overrides: what makes the case.
        comm: the workers; each has the size's batch.
        recorder: of steps, if they are recorded.
    """

    def __init__(
        self,
        size: Size,
        overrides: Overrides,
        comm: Communicator | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        comm = comm or LocalCommunicator(torch.device("cpu"))
        device = comm.device
        self.config = size.config(overrides, comm.world_size)
        self.state = TrainState(self.config, comm, size.shape, 0, recorder=recorder)
        self.play = StepGraphs(recorder) if recorder else None
        self.rule = self.state.rule(self.config)
        self.generator = self.state.players["generator"].bare
        self.discriminator = self.state.players["discriminator"].bare
        self.real = size.real(self.config).to(device)
        batch = self.config.run.global_batch
        self.positions = torch.arange(comm.rank, batch, comm.world_size, device=device)
        self.statistics, self.timer = Statistics(device), PhaseTimer(device)

    def step(self) -> None:
        """What the training loop does between two ticks, without its loader."""
        seen = self.state.samples_seen
        step = seen // self.config.step_samples
        batch = Batch(self.real, None, self.positions + seen, step)
        train_step(
            self.state, self.rule, batch, self.config, self.statistics, self.timer, self.play
        )
