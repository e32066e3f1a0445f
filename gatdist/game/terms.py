"""Terms of the generator's loss besides the adversarial one, per sample.

Legend: n samples; fields [n, …].
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gatdist.common.errors import ConfigError, PluginError
from gatdist.common.registry import Registry, call_with_options, user_code
from gatdist.config import Config, Schedule, TermConfig
from gatdist.game.scores import Scores
from gatdist.game.tasks import Fields
from gatdist.models.spectrograms import LogMelSpectrogram


@dataclass(frozen=True)
class Context:
    """What terms are functions of, at one part of the batch.

    Attributes:
        real: Fields of the samples.
        fake: The same with generated fields in place of real ones, with their graph.
        real_scores: Of the discriminator, without a graph. For terms with ``needs_features``.
        fake_scores: Of the generated samples, with their graph.
    """

    real: Fields
    fake: Fields
    fake_scores: Scores
    real_scores_if_needed: Scores | None = None

    @property
    def real_scores(self) -> Scores:
        if self.real_scores_if_needed is None:
            raise RuntimeError("real_scores are for terms with needs_features = True")
        return self.real_scores_if_needed


class Term(ABC):
    """A term, built from its options in ``game.terms.NAME``.

    Attributes:
        needs_features: Whether it reads the discriminator's outputs for real samples.
    """

    needs_features: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, context: Context) -> Tensor:
        """Return the term of each sample, [n]."""


@dataclass(frozen=True)
class WeightedTerm:
    """A term with its weight; it counts from ``start_samples`` on."""

    name: str
    term: Term
    weight: Schedule
    start_samples: int = 0

    def weight_at(self, samples_seen: int) -> float:
        return self.weight.at(samples_seen) if samples_seen >= self.start_samples else 0.0


terms: Registry[type[Term]] = Registry("game.terms")


def register_term(name: str) -> Callable[[type[Term]], type[Term]]:
    """Register a subclass of :class:`Term`, for ``game.terms``."""
    return terms.register(name)


def is_built_in(term: Term) -> bool:
    """Return whether a term comes with gatdist."""
    return type(term).__module__ == __name__


class _Difference(Term):
    """The mean of a function of the difference between a field's real and generated values."""

    def __init__(self, *, target: str, field: str | None = None) -> None:
        self.field = field or target

    def __call__(self, context: Context) -> Tensor:
        for fields in (context.real, context.fake):
            if self.field not in fields:
                rule = f"no field of the samples: {', '.join(sorted(fields))}"
                raise ConfigError("game.terms", rule, value=self.field)
        fake, real = (
            self.compared(context.fake[self.field]),
            self.compared(context.real[self.field]),
        )
        return self.function(fake - real).flatten(1).mean(1)

    def compared(self, value: Tensor) -> Tensor:
        return value

    @abstractmethod
    def function(self, difference: Tensor) -> Tensor: ...


@terms.register("l1")
class L1(_Difference):
    """Mean absolute difference."""

    def function(self, difference: Tensor) -> Tensor:
        return difference.abs()


@terms.register("l2")
class L2(_Difference):
    """Mean squared difference."""

    def function(self, difference: Tensor) -> Tensor:
        return difference.square()


@terms.register("features")
class Features(Term):
    """Mean absolute difference of the discriminator's feature maps (Larsen et al. 2016).

    Averaged over each map, summed over the maps of all sub-discriminators. ``logits``: whether the
    maps of logits count as features, as in the published code of HiFi-GAN.
    """

    needs_features = True

    def __init__(self, *, target: str, logits: bool = False) -> None:
        self.logits = logits

    def __call__(self, context: Context) -> Tensor:
        real, fake = context.real_scores, context.fake_scores
        if not fake.features:
            rule = "the discriminator returns no feature maps"
            raise ConfigError("game.terms.features", rule, hint="Remove it")
        pairs = [
            pair
            for theirs, mine in zip(real.features, fake.features, strict=True)
            for pair in zip(theirs, mine, strict=True)
        ]
        if self.logits:
            pairs += zip(real.maps, fake.maps, strict=True)
        return torch.stack([(b - a).abs().flatten(1).mean(1) for a, b in pairs]).sum(0)


@terms.register("log_mel")
class LogMel(_Difference):
    """Mean absolute difference of log-mel spectrograms of audio (Kong et al. 2020).

    The options are those of :class:`~gatdist.models.spectrograms.LogMelSpectrogram`.
    """

    def __init__(
        self,
        *,
        target: str,
        sample_rate: int,
        field: str | None = None,
        bands: PositiveInt = 80,
        window: PositiveInt = 1024,
        hop: PositiveInt = 256,
        highest: PositiveFloat | None = None,
    ) -> None:
        super().__init__(target=target, field=field)
        self.mel = LogMelSpectrogram(
            sample_rate,
            bands=bands,
            window=window,
            hop=hop,
            highest=highest,
            subject="game.terms.log_mel",
        )

    def compared(self, value: Tensor) -> Tensor:
        return self.mel(value)

    def function(self, difference: Tensor) -> Tensor:
        return difference.abs()


def build_terms(
    config: Config, target: str, metadata: Mapping[str, Any]
) -> tuple[WeightedTerm, ...]:
    """Build the terms that ``game.terms`` names; they get what they take of ``metadata``.

    Raises:
        ConfigError: A term or option is unknown, or a term never counts.
        PluginError: A user's term is no term, or fails in its constructor.
    """
    weight = config.game.adversarial_weight
    if not config.game.terms and not (weight.start or weight.end):
        hint = "Raise it, or add terms to game.terms"
        raise ConfigError("game.adversarial_weight", "leaves no loss", value=0, hint=hint)
    given = {"target": target, **metadata}
    found = []
    for name, requested in sorted(config.game.terms.items()):
        subject = f"game.terms.{name}"
        kind: Any = terms[requested.term or name]
        if not isinstance(kind, type) or not issubclass(kind, Term):
            raise PluginError(subject, "must be a subclass of gatdist.Term")
        taken = {k: v for k, v in given.items() if k in inspect.signature(kind).parameters}
        with user_code(subject, "fails in its constructor", value=requested.term or name):
            term = call_with_options(kind, requested.options, subject, **taken)
        _require_to_count(config, subject, requested)
        found.append(WeightedTerm(name, term, requested.weight, requested.start_samples))
    return tuple(found)


def _require_to_count(config: Config, subject: str, requested: TermConfig) -> None:
    """Refuse a term whose weight is zero from its start to the end of the run."""
    start, end = requested.start_samples, config.run.total_samples
    if start >= end:
        rule = f"must be below run.total_samples, {end:,}, or the term never counts"
        raise ConfigError(f"{subject}.start_samples", rule, value=start, hint="Lower or remove it")
    weight = requested.weight
    corners = start, weight.warmup, weight.delay, weight.delay + weight.samples, end
    if not any(weight.at(min(max(start, corner), end)) for corner in corners):
        rule = f"is 0 from sample {start:,} to the end of the run, {end:,}"
        raise ConfigError(f"{subject}.weight", rule, hint="Change or remove the term")
