"""The whole configuration, its checks across sections, and the keys that affect the result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NoReturn, Self

from pydantic import BaseModel, Field, model_validator

from gatdist.common.errors import ConfigError
from gatdist.config import sections
from gatdist.config.environment import REFERENCE, is_secret, redact_url
from gatdist.config.schedule import Schedule
from gatdist.config.sections import BOTH, PlayerOptimConfig, Section


class Config(Section):
    """The whole configuration of a run. See :func:`load_config`."""

    run: sections.RunConfig
    data: sections.DataConfig
    model: sections.ModelConfig = sections.ModelConfig()
    game: sections.GameConfig = sections.GameConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    precision: sections.PrecisionConfig = sections.PrecisionConfig()
    monitor: sections.MonitorConfig = sections.MonitorConfig()
    health: sections.HealthConfig = sections.HealthConfig()
    evaluate: sections.EvaluateConfig = sections.EvaluateConfig()
    cluster: sections.ClusterConfig = sections.ClusterConfig()
    plugins: list[str] = Field(default_factory=list)
    """Your own modules to import, which register networks, losses and so on."""

    @model_validator(mode="after")
    def _across_fields(self) -> Self:
        batch, workers = self.run.global_batch, self.cluster
        if self.run.reduction == "canonical":
            self._check_canonical()
        if self.run.total_samples < self.step_samples:
            self._refuse(
                "run.total_samples",
                f"must be at least the samples of one step ({self.step_samples})",
            )
        if self.data.interleave is not None and batch % self.data.interleave:
            self._refuse(
                "data.interleave",
                f"must divide run.global_batch ({batch})",
                f"Use {_nearest_divisor(batch, self.data.interleave)}",
            )
        if workers.min_workers > workers.max_workers:
            self._refuse("cluster.workers", "must be [min, max]")
        if workers.spares and workers.after_loss == "restart":
            self._refuse("cluster.spares", "needs cluster.after_loss = 'continue'")
        if self.run.convergence is not None:
            self._check_measured("run.convergence.metric")
        if self.run.keep_best_checkpoints:
            self._check_measured("run.best_metric")
        if self.data.held_out and self.evaluate.url:
            self._refuse("evaluate.url", "excludes data.held_out", "Keep one of them")
        if self.health.may_roll_back and self.run.checkpoint_every_samples == "auto":
            self._refuse(
                "run.checkpoint_every_samples",
                "must be a number with health.nonfinite or health.spike = 'rollback', because the "
                "result depends on where the run goes back to",
                "For example 16384",
            )
        self._check_profile()
        self._check_generator_batch()
        return self

    def _refuse(self, key: str, rule: str, hint: str = "") -> NoReturn:
        raise ConfigError(key, rule, value=attrgetter(key)(self), hint=hint)

    def _check_generator_batch(self) -> None:
        if self.generator_batch > self.step_samples:
            rule = (
                f"must be at most the samples of a step's discriminator steps, {self.step_samples}"
            )
            self._refuse("game.generator_batch", rule, f"Use {self.step_samples}")
        if self.run.reduction == "canonical" and self.generator_batch % self.run.virtual_workers:
            rule = f"must be divisible by run.virtual_workers ({self.run.virtual_workers})"
            self._refuse("game.generator_batch", rule)

    def _check_profile(self) -> None:
        if self.monitor.profile_steps is None:
            return
        first, stop = self.monitor.profile_steps
        steps = -(-self.run.total_samples // self.step_samples)
        if first >= stop:
            rule, hint = "must be a first step and a later one", f"Use {first}:{first + 10}"
        elif stop - first > _MOST_PROFILED:
            rule = f"must be at most {_MOST_PROFILED} steps: nothing opens a longer trace"
            hint = f"Use {first}:{first + 10}"
        elif stop > steps:
            rule = f"must end within the run, which has {steps:,} steps"
            hint = f"Use {max(0, steps - stop + first)}:{steps}, or more run.total_samples"
        else:
            return
        raise ConfigError("monitor.profile_steps (--profile)", rule, value=[first, stop], hint=hint)

    def _check_measured(self, key: str) -> None:
        if attrgetter(key)(self) not in self.evaluate.metrics:
            self._refuse(
                key, f"must be one of evaluate.metrics ({', '.join(self.evaluate.metrics)})"
            )
        if not self.evaluate.every_samples:
            hint = "Set how often the metric is measured"
            self._refuse("evaluate.every_samples", f"must be above 0 if {key} is set", hint)

    def _check_canonical(self) -> None:
        parts, batch = self.run.virtual_workers, self.run.global_batch
        if parts & (parts - 1):
            hint = f"Use {2 ** (parts.bit_length() - 1)}"
            self._refuse("run.virtual_workers", "must be a power of two", hint)
        if batch % parts:
            hint = f"Use {batch & -batch}, or another batch"
            self._refuse("run.virtual_workers", f"must divide run.global_batch ({batch})", hint)
        for name in BOTH:
            player: PlayerOptimConfig = getattr(self.optim, name)
            if player.micro_batch is not None:
                self._refuse(
                    f"optim.{name}.micro_batch",
                    "has no effect under run.reduction = 'canonical', which computes one virtual "
                    "worker at a time",
                    "Leave it out, and raise run.virtual_workers",
                )
        if self.precision.reduce_dtype != "full":
            self._refuse(
                "precision.reduce_dtype",
                "must be 'full' under run.reduction = 'canonical', whose result must not depend on "
                "the number of workers",
                "Use 'full', or run.reduction = 'fast'",
            )

    @property
    def step_samples(self) -> int:
        """Real samples per step, summed over workers: a global batch per discriminator step."""
        return self.run.global_batch * self.game.num_discriminator_steps

    @property
    def log_every_samples(self) -> int:
        """``run.log_every_samples``, or its default."""
        every = self.run.log_every_samples
        return max(_LOG_SAMPLES, _LOG_STEPS * self.step_samples) if every == "auto" else every

    @property
    def generator_batch(self) -> int:
        """Samples per generator step, summed over workers."""
        return self.game.generator_batch or self.run.global_batch

    def at_once(self, num_workers: int, device: str) -> int | None:
        """Return how many samples a worker generates at once outside of steps; None: no limit.

        On GPUs as many as in a step, so that previews and evaluations need no more memory than
        training. Under ``canonical`` it does not depend on the number of workers. CPUs have no
        limit: convolutions may round differently in other batches.
        """
        if device == "cpu":
            return None
        parts = self.run.virtual_workers if self.run.reduction == "canonical" else num_workers
        share = -(-self.generator_batch // parts)  # the largest
        return min(share, self.optim.generator.micro_batch or share)

    @property
    def interleave(self) -> int:
        """``data.interleave``, or its default: the largest divisor of the batch up to 64."""
        batch = self.run.global_batch
        return self.data.interleave or next(
            n for n in range(min(64, batch), 0, -1) if batch % n == 0
        )

    def check_workers(self, num_workers: int) -> None:
        """Raise ConfigError unless each of ``num_workers`` workers has a part of each batch."""
        parts = self.run.virtual_workers
        if self.run.reduction == "canonical" and num_workers > parts:
            raise ConfigError(
                "cluster.workers",
                f"must be at most run.virtual_workers ({parts}) under run.reduction = 'canonical'",
                value=num_workers,
                hint=f"Use --workers {parts}, or run.reduction = 'fast'",
            )
        batches = {
            "run.global_batch": self.run.global_batch,
            "game.generator_batch": self.generator_batch,
        }
        for key, batch in batches.items():
            if batch < num_workers:
                raise ConfigError(
                    key,
                    f"must have a sample for each of the {num_workers} workers",
                    value=batch,
                    hint=f"Use {num_workers}, or --workers {batch}",
                )

    def speedup(self, num_workers: int) -> float:
        """Return how many times as fast as one worker these are at best: batch / largest share."""
        canonical = self.run.reduction == "canonical"
        parts = self.run.virtual_workers if canonical else self.run.global_batch
        return parts / -(-parts // num_workers)

    def fitting_workers(self) -> range:
        """Return the sizes in ``cluster.workers`` that can share the global batch.

        Raises:
            ConfigError: there is none.
        """
        least = self.cluster.min_workers
        self.check_workers(least)
        most = min(self.cluster.max_workers, self.run.global_batch, self.generator_batch)
        if self.run.reduction == "canonical":
            most = min(most, self.run.virtual_workers)
        return range(least, most + 1)

    def schedules(self) -> dict[str, Schedule]:
        """Return the schedules that change, by dotted key."""
        found: dict[str, Schedule] = {}

        def collect(value: Any, key: str) -> None:
            if isinstance(value, Schedule):
                if not value.is_constant:
                    found[key] = value
            elif isinstance(value, BaseModel | Mapping):
                for name, inner in dict(value).items():
                    collect(inner, f"{key}.{name}".lstrip("."))
            elif isinstance(value, list):
                for i, inner in enumerate(value):
                    collect(inner, f"{key}.{i}")

        collect(self, "")
        return found

    def redacted(self) -> dict[str, Any]:
        """Return the configuration as JSON values with secrets masked and references kept."""
        values = self.model_dump(mode="json")
        for section, key in _SECRETIVE:
            values[section][key] = _masked(values[section][key])
        for term in values["game"]["terms"].values():
            if "file" in term:
                term["file"] = _masked(term["file"])
        return values

    def result_keys(self) -> dict[str, Any]:
        """Return the dotted keys that affect the result of a step, and their values."""
        flat = flatten(self.model_dump(mode="json"))
        exact = {
            key: value
            for key, value in flat.items()
            if key.startswith(_RESULT_KEYS)
            and not _LOCATION.search(key)
            # A file with a digest may be anywhere.
            and not (key.endswith(".file") and f"{key.removesuffix('file')}sha256" in flat)
        }
        exact["data.interleave"] = self.interleave
        exact["model.init_from"] = redact_url(self.model.init_from)
        return exact

    def digest(self) -> str:
        """Return the SHA-256 (hex) of :meth:`result_keys`."""
        return hashlib.sha256(json.dumps(self.result_keys(), sort_keys=True).encode()).hexdigest()


_MOST_PROFILED = 500
# Keys that say where something is, which may change.
_LOCATION = re.compile(r"^model\.init_from_storage|^data\.unpaired\.\w+\.(url|shards_|storage_)")
# A reference, or one after the scheme of an HTTP header.
_AUTHORIZATION = re.compile(rf"(?:(?:Basic|Bearer|Token) )?{REFERENCE.pattern}")
# Keys that may hold secrets, by the names of their values or in URLs.
_SECRETIVE = (
    ("run", "storage_options"),
    ("data", "storage_options"),
    ("data", "url"),
    ("data", "shards_url"),
    ("data", "shards_storage_options"),
    ("data", "unpaired"),
    ("model", "init_from"),
    ("model", "init_from_storage_options"),
    ("evaluate", "url"),
    ("evaluate", "storage_options"),
    ("evaluate", "features_file"),
    ("cluster", "runtime_env"),
)
# Of a log interval, at least.
_LOG_SAMPLES, _LOG_STEPS = 4096, 50
_RESULT_KEYS = (
    "run.global_batch",
    "run.seed",
    "run.reduction",
    "run.virtual_workers",
    "data.resolution",
    "data.resize",
    "data.dequantize",
    "data.x_flip",
    "data.channels",
    "data.length",
    "data.vocabulary",
    "data.held_out",
    "data.unpaired.",
    "data.shuffle_window_samples",
    "data.block_bytes",
    "model.",
    "game.",
    "optim.",
    "precision.",
    "health.atomic",
    "health.spike",
)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _masked(value: Any, key: str = "") -> Any:
    """Mask JSON values of secret names, and secrets in URLs."""
    if isinstance(value, dict):
        return {name: _masked(one, f"{key}.{name}") for name, one in value.items()}
    if isinstance(value, list):
        return [_masked(one, key) for one in value]
    is_reference = isinstance(value, str) and _AUTHORIZATION.fullmatch(value)
    if is_secret(key) and value is not None and not is_reference:
        return "***"
    return redact_url(value) if isinstance(value, str) else value


def _nearest_divisor(number: int, requested: int) -> int:
    return min(
        (n for n in range(1, number + 1) if number % n == 0), key=lambda n: (abs(n - requested), n)
    )
