"""What the numbers of a tick are, by their tags in TensorBoard and ``metrics.jsonl``."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Tag:
    """Of one number, or of several of a kind.

    Attributes:
        name: with ``<player>`` for ``generator`` and ``discriminator``, and other words in such
            brackets for what the configuration names.
        meaning: of the number, with its unit. Means are over the tick and all workers.
    """

    name: str
    meaning: str

    def matches(self, tag: str) -> bool:
        """Whether ``tag`` is one of these."""
        pattern = re.sub(r"<\w+>", r"[^/]+", re.escape(self.name))
        return re.fullmatch(pattern, tag) is not None


TAGS = (
    Tag("loss/<player>", "mean loss, penalties left out"),
    Tag("penalty/<name>", "mean of the penalty, times its strength, where it was due"),
    Tag("logits/real", "mean logit of real samples"),
    Tag("logits/fake", "mean logit of fakes"),
    Tag(
        "logits/pairwise_accuracy",
        "share of (real, fake) pairs in which the real sample has the higher logit: ½ where the "
        "discriminator knows nothing, 1 where it has won",
    ),
    Tag("gradient_norm/<player>", "mean 2-norm of the whole gradient, over all workers"),
    Tag("learning_rate/<player>", "at the end of the tick"),
    Tag("diversity/ratio", "deviation of fakes over the batch, over that of real samples"),
    Tag("augmentation/p", "probability that `ada` changes a sample with"),
    Tag("augmentation/sign_real", "what `ada` steers by: mean sign of real samples' logits"),
    Tag("competitive/iterations", "iterations of the solver of `competitive` in a step"),
    Tag("throughput/samples_per_s", "real samples a second, of all workers"),
    Tag("throughput/samples_per_s_per_worker", "real samples a second, of one worker"),
    Tag("throughput/workers", "how many there are"),
    Tag("time/step_s", "seconds a step"),
    Tag("time/data_s", "seconds of a step that wait for data"),
    Tag(
        "time/<phase>_s",
        "seconds of a step in each phase: the players, `optimizer`; `phases` of recorded ones",
    ),
    Tag("time/communication_s", "seconds of a step in which gradients are on their way"),
    Tag("time/evaluation_s", "seconds that the last evaluation took"),
    Tag("data/bytes_fetched", "bytes that all workers fetched in the tick"),
    Tag("data/cache_hits", "blocks that the cache had"),
    Tag("data/ready_batches", "batches that were ready when one was asked for"),
    Tag("health/bad_samples", "different samples that could not be read, so far"),
    Tag("health/skipped_steps", "phases that moved nobody, so far"),
    Tag("health/rollbacks", "times that the run went back, so far"),
    Tag("health/storage_wait_s", "seconds for which the present write has been under way"),
    Tag("health/stragglers", "workers that hold the others up"),
    Tag("health/loss_scale", "of float16"),
    Tag("health/vanishing_gradient_<player>", "1 where the alarm was raised"),
    Tag("health/exploding_gradient_<player>", "1 where the alarm was raised"),
    Tag("health/collapse", "1 where the alarm was raised: fakes hardly differ"),
    Tag("health/discriminator_won", "1 where the alarm was raised"),
    Tag("metric/<name>", "of the averaged generator; the protocol stands beside it"),
)
# What else a line of metrics.jsonl holds.
FIELDS = (
    Tag("samples_seen", "real samples shown so far: the clock"),
    Tag("world_size", "workers"),
    Tag("wall_time_s", "seconds of training so far, over all starts"),
    Tag("protocol", "how the metrics were measured"),
)
