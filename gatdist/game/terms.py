"""Terms of the generator's loss besides the adversarial one, per sample.

Legend: n samples; fields [n, …].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt
from torch import Tensor

from gatdist.common.errors import ConfigError, PluginError
from gatdist.common.registry import Registry, call_with_options, user_code
from gatdist.config import Config, Schedule, TermConfig, redact_url
from gatdist.game.scores import Scores
from gatdist.game.tasks import Fields, taken_by
from gatdist.models.spectrograms import LogMelSpectrogram
from gatdist.models.torchscript import FrozenNetwork, read_verified


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


class _OfField(Term):
    """A term of one field's real and generated values; by default, the target's."""

    def __init__(self, *, target: str, subject: str, field: str | None = None) -> None:
        self.subject, self.field = subject, field or target

    def __call__(self, context: Context) -> Tensor:
        for fields in (context.real, context.fake):
            if self.field not in fields:
                rule = f"no field of the samples: {', '.join(sorted(fields))}"
                raise ConfigError(f"{self.subject}.field", rule, value=self.field)
        return self.difference(context.fake[self.field], context.real[self.field])

    @abstractmethod
    def difference(self, fake: Tensor, real: Tensor) -> Tensor:
        """Return the term of each sample, [n]."""


@terms.register("l1")
class L1(_OfField):
    """Mean absolute difference."""

    def difference(self, fake: Tensor, real: Tensor) -> Tensor:
        return (fake - real).abs().flatten(1).mean(1)


@terms.register("l2")
class L2(_OfField):
    """Mean squared difference."""

    def difference(self, fake: Tensor, real: Tensor) -> Tensor:
        return (fake - real).square().flatten(1).mean(1)


@terms.register("features")
class Features(Term):
    """Mean absolute difference of the discriminator's feature maps (Larsen et al. 2016).

    Averaged over each map, summed over the maps of all sub-discriminators. ``logits``: whether the
    maps of logits count as features, as in the published code of HiFi-GAN.
    """

    needs_features = True

    def __init__(self, *, subject: str, logits: bool = False) -> None:
        self.subject, self.logits = subject, logits

    def __call__(self, context: Context) -> Tensor:
        real, fake = context.real_scores, context.fake_scores
        if not fake.features:
            rule = "the discriminator returns no feature maps"
            raise ConfigError(self.subject, rule, hint="Remove it")
        pairs = [
            pair
            for theirs, mine in zip(real.features, fake.features, strict=True)
            for pair in zip(theirs, mine, strict=True)
        ]
        if self.logits:
            pairs += zip(real.maps, fake.maps, strict=True)
        return torch.stack([(b - a).abs().flatten(1).mean(1) for a, b in pairs]).sum(0)


@terms.register("log_mel")
class LogMel(_OfField):
    """Mean absolute difference of log-mel spectrograms of audio (Kong et al. 2020).

    The options are those of :class:`~gatdist.models.spectrograms.LogMelSpectrogram`.
    """

    def __init__(
        self,
        *,
        target: str,
        subject: str,
        sample_rate: int,
        field: str | None = None,
        bands: PositiveInt = 80,
        window: PositiveInt = 1024,
        hop: PositiveInt = 256,
        highest: PositiveFloat | None = None,
    ) -> None:
        super().__init__(target=target, subject=subject, field=field)
        self.mel = LogMelSpectrogram(
            sample_rate,
            bands=bands,
            window=window,
            hop=hop,
            highest=highest,
            subject=subject,
        )

    def difference(self, fake: Tensor, real: Tensor) -> Tensor:
        return (self.mel(fake) - self.mel(real)).abs().flatten(1).mean(1)


@terms.register("perceptual")
class Perceptual(_OfField):
    """Difference of feature maps of a network from a TorchScript file (Johnson et al. 2016).

    The network maps images [n, 3, H, W] to a map [n, …] or a list of maps, each sample for itself.
    It is not trained, and computes in the precision of the images. Grayscale images are passed as
    three equal channels. Differences are averaged over each map and summed over the maps.

    Args:
        target: Of the task.
        subject: Configuration key of the term, for messages.
        file: URL of the network.
        sha256: SHA-256 of the file, in hex. TorchScript is a program: run only what you trust.
        field: Images that are compared; None: the target.
        pixel_range: What the network expects for black and white.
        distance: Absolute (``l1``) or squared (``l2``).
        map_weights: Factors of the maps, none below 0; None: 1 each.
        arguments: Keyword arguments of the network's ``forward`` besides the images.

    Raises:
        ConfigError: The file has another digest or is no TorchScript, or its network does not fit.
    """

    def __init__(
        self,
        *,
        target: str,
        subject: str,
        file: str,
        sha256: str,
        field: str | None = None,
        pixel_range: list[FiniteFloat] = [0.0, 1.0],  # noqa: B006
        distance: Literal["l1", "l2"] = "l1",
        map_weights: list[Annotated[FiniteFloat, Field(ge=0)]] | None = None,
        arguments: dict[str, Any] = {},  # noqa: B006
    ) -> None:
        super().__init__(target=target, subject=subject, field=field)
        if len(pixel_range) != 2 or pixel_range[0] == pixel_range[1]:
            rule = "must be the two values for black and white"
            raise ConfigError(f"{subject}.pixel_range", rule, value=pixel_range)
        if map_weights and not any(map_weights):
            raise ConfigError(f"{subject}.map_weights", "must not all be 0", value=map_weights)
        self._black, self._white = pixel_range
        self._power, self._weights = {"l1": 1, "l2": 2}[distance], map_weights
        self._file, self._arguments = redact_url(file), arguments
        keys = {"file_key": f"{subject}.file", "sha256_key": f"{subject}.sha256"}
        content = read_verified(file, sha256, **keys)
        try:
            self._network = FrozenNetwork(content)
        except RuntimeError as error:
            rule = f"is no network in TorchScript ({str(error).strip().splitlines()[0]})"
            raise self._refused(rule) from None
        for name in arguments:
            if name not in self._network.parameters:
                known = ", ".join(self._network.parameters) or "none"
                rule = f"no argument of the network besides the images: {known}"
                raise ConfigError(f"{subject}.arguments", rule, value=name)

    def difference(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = self._maps(real)
        mine = self._maps(fake)
        weights = [1.0] * len(mine) if self._weights is None else self._weights
        if len(weights) != len(mine):
            rule = f"must have one value per map of the network, {len(mine)}"
            raise ConfigError(f"{self.subject}.map_weights", rule, value=weights)
        values = [
            weight * (a - b).abs().pow(self._power)[:, None].flatten(1).mean(1)
            for weight, a, b in zip(weights, mine, theirs, strict=True)
        ]
        return torch.stack(values).sum(0)

    def _maps(self, images: Tensor) -> Sequence[Tensor]:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            rule = f"needs images of 1 or 3 channels; found {list(images.shape[1:])}"
            raise ConfigError(f"{self.subject}.field", rule, value=self.field)
        pixels = (images + 1) / 2 * (self._white - self._black) + self._black
        pixels = pixels.expand(-1, 3, -1, -1)
        found = self._network(pixels, dtype=images.dtype, **self._arguments)
        maps = [found] if isinstance(found, Tensor) else found
        is_list = isinstance(maps, list | tuple) and len(maps) > 0
        if not is_list or not all(
            isinstance(m, Tensor) and m.is_floating_point() and m.shape[:1] == images.shape[:1]
            for m in maps
        ):
            rule = "must return a floating-point tensor, or a list of them, with a row per sample"
            raise self._refused(rule)
        return maps

    def _refused(self, rule: str) -> ConfigError:
        hint = "Save a network of images with torch.jit.save"
        return ConfigError(f"{self.subject}.file", rule, value=self._file, hint=hint)


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
    found = []
    for name, requested in sorted(config.game.terms.items()):
        subject = f"game.terms.{name}"
        kind: Any = terms[requested.term or name]
        if not isinstance(kind, type) or not issubclass(kind, Term):
            raise PluginError(subject, "must be a subclass of gatdist.Term")
        available = {"target": target, "subject": subject, **metadata}
        taken = taken_by(kind, available, requested.options, subject)
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
