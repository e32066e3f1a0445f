"""The tags of a run's metrics, and the charts that group them in TensorBoard and in the report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tag:
    """A metric, or several of a kind: placeholders in ``<>`` stand for names such as of players.

    ``meaning`` includes the unit. Means are over the log interval and all workers.
    """

    name: str
    meaning: str


TAGS = (
    Tag("loss/<player>", "mean loss without penalties"),
    Tag("loss/adversarial", "mean adversarial loss of the generator, before its weight"),
    Tag("loss/terms", "mean weighted sum of the terms of the generator's loss"),
    Tag("term/<name>", "mean of a term, before its weight"),
    Tag("penalty/<name>", "mean penalty times its strength, over the steps that compute it"),
    Tag("logits/real", "mean logit of real samples"),
    Tag("logits/fake", "mean logit of fakes"),
    Tag(
        "logits/pairwise_accuracy",
        "share of (real, fake) pairs in which the real sample has the higher logit: 0.5 for a "
        "discriminator that guesses, 1 for one that has won",
    ),
    Tag("gradient_norm/<player>", "mean 2-norm of the whole gradient, after the reduction"),
    Tag("learning_rate/<player>", "at the end of the log interval"),
    Tag("schedule/<key>", "value of a scheduled key at the end of the log interval"),
    Tag("diversity/ratio", "standard deviation of fakes over the batch, divided by that of reals"),
    Tag("augmentation/p", "augmentation probability of `ada`"),
    Tag("augmentation/sign_real", "control signal of `ada`: mean sign of real samples' logits"),
    Tag("competitive/iterations", "solver iterations per step of `competitive`"),
    Tag("throughput/samples_per_s", "real samples per second, all workers"),
    Tag("throughput/samples_per_s_per_worker", "real samples per second, one worker"),
    Tag("throughput/workers", "number of workers"),
    Tag("workers/changes", "changes of workers without a restart, so far"),
    Tag("workers/steps_undone", "steps that they undid, which were repeated, so far"),
    Tag("workers/change_s", "seconds that they took, so far"),
    Tag("workers/lost_s", "seconds that they and the undone steps took, so far"),
    Tag("time/step_s", "seconds per step"),
    Tag("time/data_s", "seconds per step spent waiting for data"),
    Tag(
        "time/<phase>_s",
        "seconds per step in each phase: the players, `optimizer`; `phases` of recorded ones",
    ),
    Tag("time/communication_s", "seconds per step with gradients in flight"),
    Tag("time/evaluation_s", "seconds of the last evaluation"),
    Tag("data/bytes_fetched", "bytes fetched by all workers in the log interval"),
    Tag("data/cache_hits", "blocks found in the cache"),
    Tag("data/ready_batches", "batches that were ready when one was requested"),
    Tag("health/bad_samples", "different unreadable samples, so far"),
    Tag("health/skipped_steps", "phases skipped on every rank, so far"),
    Tag("health/rollbacks", "rollbacks, so far"),
    Tag("health/storage_wait_s", "seconds since the current write began"),
    Tag("health/stragglers", "number of stragglers"),
    Tag("health/loss_scale", "loss scale of float16"),
    Tag("health/vanishing_gradient_<player>", "1 if the alarm was raised"),
    Tag("health/exploding_gradient_<player>", "1 if the alarm was raised"),
    Tag("health/collapse", "1 if the alarm was raised: fakes hardly differ"),
    Tag("health/discriminator_won", "1 if the alarm was raised"),
    Tag("metric/<name>", "of the averaged generator; see `protocol`"),
)
# Other fields of a line of metrics.jsonl.
FIELDS = (
    Tag("samples_seen", "real samples shown so far: the training progress"),
    Tag("world_size", "workers"),
    Tag("wall_time_s", "seconds of training so far, over all attempts"),
    Tag("protocol", "how the metrics were measured"),
)


@dataclass(frozen=True)
class Chart:
    """Curves in one chart: those whose tags fully match the regular expression ``pattern``."""

    title: str
    pattern: str

    def tags(self, known: Iterable[str]) -> list[str]:
        return [tag for tag in known if re.fullmatch(self.pattern, tag)]


_PLAYERS = "(generator|discriminator)"
_METRIC = "metric/"
ALARMS = r"health/(collapse|discriminator_won|(vanishing|exploding)_gradient_.+)"

CHARTS = {
    "Players": (
        Chart("Losses", f"loss/{_PLAYERS}"),
        Chart("Logits", "logits/(real|fake)"),
        Chart("Pairwise accuracy", "logits/pairwise_accuracy"),
        Chart("Gradient norms", f"gradient_norm/{_PLAYERS}"),
        Chart("Penalties", "penalty/.+"),
        Chart("Augmentation", "augmentation/.+"),
        Chart("Learning rates", f"learning_rate/{_PLAYERS}"),
        Chart("Penalty strengths", r"schedule/game\.penalties\..+"),
        Chart("Adam's decay rates", r"schedule/optim\..+\.betas\.[01]"),
        Chart("Half-life of the average, in samples", r"schedule/game\.ema_half_life_samples"),
    ),
    "Metrics": (),  # see `charts_of`
    "Health": (
        Chart("Diversity of fakes, divided by that of reals", "diversity/ratio"),
        Chart("Alarms", ALARMS),
        Chart("Skipped steps, rollbacks", "health/(skipped_steps|rollbacks)"),
        Chart("Stragglers", "health/stragglers"),
        Chart("Bad samples", "health/bad_samples"),
        Chart("Seconds since the current write began", "health/storage_wait_s"),
        Chart("Loss scale of float16", "health/loss_scale"),
    ),
    "Time": (
        Chart("Seconds per step by phase", "time/(?!step_s|evaluation_s|communication_s).+"),
        Chart("Seconds per step, and of communication", "time/(step|communication)_s"),
        Chart("Seconds per evaluation", "time/evaluation_s"),
    ),
    "Data": (
        Chart("Seconds per step spent waiting for data", "time/data_s"),
        Chart("Ready batches", "data/ready_batches"),
        Chart("Bytes fetched per log interval", "data/bytes_fetched"),
        Chart("Cached blocks per log interval", "data/cache_hits"),
    ),
    "Scaling": (
        Chart("Samples per second", "throughput/samples_per_s"),
        Chart("Samples per second and worker", "throughput/samples_per_s_per_worker"),
        Chart("Workers", "throughput/workers"),
        Chart("Changes of workers, and steps undone", "workers/(changes|steps_undone)"),
        Chart("Seconds of changes, and lost with undone steps", "workers/(change|lost)_s"),
    ),
}


def charts_of(tags: Iterable[str]) -> dict[str, list[Chart]]:
    """Return the charts that have a curve among ``tags``, by group.

    Each metric has a chart of its own, together with its real-vs-real value.
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
