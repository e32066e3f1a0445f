"""Which curves of a run belong in one chart, and which charts belong together.

TensorBoard's custom scalars and the report are both laid out by this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """Some curves that are compared.

    Attributes:
        title: of the chart.
        pattern: a regular expression of the tags in it, from their first to their last character.
    """

    title: str
    pattern: str

    def tags(self, known: Iterable[str]) -> list[str]:
        """Those of the ``known`` tags that are in it, in their order."""
        return [tag for tag in known if re.fullmatch(self.pattern, tag)]


_PLAYERS = "(generator|discriminator)"
_METRIC = "metric/"
ALARMS = r"health/(collapse|discriminator_won|(vanishing|exploding)_gradient_.+)"

CHARTS = {
    "Players": (
        Chart("Losses", f"loss/{_PLAYERS}"),
        Chart("Logits", "logits/(real|fake)"),
        Chart("Pairs (real, fake) ranked rightly", "logits/pairwise_accuracy"),
        Chart("Gradient norms", f"gradient_norm/{_PLAYERS}"),
        Chart("Penalties", "penalty/.+"),
        Chart("Augmentation", "augmentation/.+"),
        Chart("Learning rates", f"learning_rate/{_PLAYERS}"),
    ),
    "Metrics": (),  # see `charts_of`
    "Health": (
        Chart("How much fakes vary, real samples being 1", "diversity/ratio"),
        Chart("Alarms", ALARMS),
        Chart("Steps that moved nobody, rollbacks", "health/(skipped_steps|rollbacks)"),
        Chart("Workers that hold the others up", "health/stragglers"),
        Chart("Bad samples", "health/bad_samples"),
        Chart("Seconds that storage has kept a write waiting", "health/storage_wait_s"),
        Chart("Scale of float16's losses", "health/loss_scale"),
    ),
    "Time": (
        Chart("Seconds a step by phase", "time/(?!step_s|evaluation_s|communication_s).+"),
        Chart("Seconds a step, and gradients on their way", "time/(step|communication)_s"),
        Chart("Seconds an evaluation", "time/evaluation_s"),
    ),
    "Data": (
        Chart("Seconds a step waits for data", "time/data_s"),
        Chart("Batches that are ready", "data/ready_batches"),
        Chart("Bytes fetched a tick", "data/bytes_fetched"),
        Chart("Blocks a tick that the cache had", "data/cache_hits"),
    ),
    "Scaling": (
        Chart("Samples a second", "throughput/samples_per_s"),
        Chart("Samples a second and worker", "throughput/samples_per_s_per_worker"),
        Chart("Workers", "throughput/workers"),
    ),
}


def charts_of(tags: Iterable[str]) -> dict[str, list[Chart]]:
    """The charts that have a curve among ``tags``, by the name of their group.

    Each metric has a chart of its own; that between halves of the real samples is in its metric's.
    """
    tags = list(tags)
    names = [tag for tag in tags if tag.startswith(_METRIC)]
    metrics = [
        Chart(tag.removeprefix(_METRIC), f"{re.escape(tag)}(_real_split)?")
        for tag in names
        if tag.removesuffix("_real_split") == tag or tag.removesuffix("_real_split") not in names
    ]
    groups = {name: list(charts) for name, charts in CHARTS.items()} | {"Metrics": metrics}
    shown = {name: [c for c in charts if c.tags(tags)] for name, charts in groups.items()}
    return {name: charts for name, charts in shown.items() if charts}
