"""The sections and keys of a configuration, their defaults, and the checks across fields."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gatdist.config.environment import REFERENCE
from gatdist.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: frozen, exact types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ConvergenceConfig(Section):
    """When to stop: ``metric`` has not improved for ``patience_samples``.

    An improvement is a value below the best so far by ``min_improvement``, a share of it.
    """

    metric: str = "fid"
    patience_samples: PositiveInt
    min_improvement: NonNegativeFloat = 0.0


class RunConfig(Section):
    """How much is trained, in what portions, from which seed."""

    total_samples: PositiveInt
    global_batch: PositiveInt = 64
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tick_samples: PositiveInt = 4096
    checkpoint_samples: PositiveInt = 16384
    keep_checkpoints: PositiveInt = 2
    reduction: Literal["fast"] = "fast"
    convergence: ConvergenceConfig | None = None
    storage_options: dict[str, Any] = {}


class DataConfig(Section):
    """Where the samples are and how they are read.

    ``builtin:digits`` and ``builtin:ring`` need no files.
    """

    url: str
    resolution: (
        PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None
    ) = None
    lanes: PositiveInt | None = None
    window_samples: PositiveInt = 4096
    block_bytes: PositiveInt = 4 * 2**20
    prefetch_batches: PositiveInt = 4
    decode_threads: PositiveInt = 1
    storage_options: dict[str, Any] = {}


class NetworkConfig(BaseModel):
    """A registered network and its own options, which its builder's signature checks."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside ``name``."""
        return dict(self.model_extra or {})


class ModelConfig(Section):
    """The two players."""

    generator: NetworkConfig = NetworkConfig(name="residual")
    discriminator: NetworkConfig = NetworkConfig(name="residual")
    latent_size: PositiveInt = 64
    conditional: bool = False


class PenaltyConfig(Section):
    """A penalty on the discriminator, every so many steps and as many times as strong."""

    strength: PositiveFloat
    every_steps: PositiveInt = 1


class GameConfig(Section):
    """Losses, penalties, the update rule and the average of the generator."""

    loss: str = "nonsaturating"
    update_rule: str = "alternating"
    order: Literal["discriminator_first", "generator_first"] = "discriminator_first"
    latents: Literal["fresh", "shared"] = "fresh"
    penalties: dict[str, PenaltyConfig] = {}
    averaging_half_life_samples: PositiveFloat = 10_000.0


class PlayerOptimConfig(Section):
    """One player's optimizer.

    ``clip_norm`` bounds the 2-norm of its whole gradient; 0 leaves it alone.
    """

    name: Literal["adam", "sgd"] = "adam"
    learning_rate: PositiveFloat = 2e-4
    betas: Annotated[
        list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)
    ] = [
        0.0,
        0.99,
    ]
    eps: PositiveFloat = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: NonNegativeFloat = 0.0


class OptimConfig(Section):
    """Both optimizers and the schedule they share.

    Linear warm-up, a plateau, then a decay that ends at ``run.total_samples`` with
    ``final_fraction`` of the rate.
    """

    generator: PlayerOptimConfig = PlayerOptimConfig()
    discriminator: PlayerOptimConfig = PlayerOptimConfig()
    warmup_samples: NonNegativeInt = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_start_samples: NonNegativeInt = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


class PrecisionConfig(Section):
    """The dtype of parameters and computation."""

    dtype: Literal["float32", "float64"] = "float32"


class MonitorConfig(Section):
    """What is shown of the run."""

    tensorboard: bool = True
    grid_samples: PositiveInt = 100


class HealthConfig(Section):
    """What to do about non-finite steps, and when to raise which alarm.

    A step whose reduced gradients are not finite never moves a parameter. Under ``skip`` the run
    goes on until more than ``nonfinite_budget`` steps in all were skipped; under ``stop`` the first
    one ends it. Alarms are judged on each tick's means: gradient norms below ``vanishing_norm`` or
    above ``exploding_norm``; fakes whose deviation over the batch is less than ``collapse_ratio``
    of the real samples'; a discriminator that ranks more than ``won_accuracy`` of the (real, fake)
    pairs rightly.
    """

    nonfinite: Literal["skip", "stop"] = "skip"
    nonfinite_budget: NonNegativeInt = 20
    vanishing_norm: NonNegativeFloat = 1e-6
    exploding_norm: PositiveFloat = 1e4
    collapse_ratio: NonNegativeFloat = 0.1
    won_accuracy: Annotated[float, Field(gt=0.5, le=1)] = 0.99


class EvaluateConfig(Section):
    """Which metrics, on how many samples, how often (0: at the end only)."""

    metrics: list[str] = ["fid", "kid"]
    num_samples: PositiveInt | None = None
    every_samples: NonNegativeInt = 0
    features: str = "classifier"


class ClusterConfig(Section):
    """Workers and how they reach one another. ``address`` "" starts Ray on this machine."""

    workers: PositiveInt = 1
    address: str = ""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    gpus_per_worker: NonNegativeInt | None = None
    cpus_per_worker: PositiveInt = 1
    timeout_s: PositiveFloat = 120.0
    max_failures: NonNegativeInt = 0


class Config(Section):
    """The whole configuration of a run. See :func:`load_config`.

    Raises:
        ConfigError: from :func:`load_config` and :func:`parse_config`, for the first key that is
            wrong.
    """

    run: RunConfig
    data: DataConfig
    model: ModelConfig = ModelConfig()
    game: GameConfig = GameConfig()
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    monitor: MonitorConfig = MonitorConfig()
    health: HealthConfig = HealthConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    plugins: list[str] = []

    @model_validator(mode="after")
    def _across_fields(self) -> Self:
        if self.run.total_samples < self.run.global_batch:
            raise ConfigError(
                "run.total_samples",
                f"must be at least run.global_batch ({self.run.global_batch})",
                value=self.run.total_samples,
            )
        if self.data.lanes is not None and self.run.global_batch % self.data.lanes:
            raise ConfigError(
                "data.lanes",
                f"must divide run.global_batch ({self.run.global_batch})",
                value=self.data.lanes,
                mend=f"Use {_nearest_divisor(self.run.global_batch, self.data.lanes)}",
            )
        convergence = self.run.convergence
        if convergence is not None:
            if convergence.metric not in self.evaluate.metrics:
                raise ConfigError(
                    "run.convergence.metric",
                    f"must be one of evaluate.metrics ({', '.join(self.evaluate.metrics)})",
                    value=convergence.metric,
                )
            if not self.evaluate.every_samples:
                raise ConfigError(
                    "evaluate.every_samples",
                    "must be above 0 when run.convergence is set",
                    value=0,
                    mend="Set how often the metric is measured",
                )
        return self

    @property
    def lanes(self) -> int:
        """Number of lanes of the sample order.

        ``data.lanes``, else the largest divisor of the batch up to 64.
        """
        batch = self.run.global_batch
        return self.data.lanes or next(n for n in range(min(64, batch), 0, -1) if batch % n == 0)

    def check_workers(self, num_workers: int) -> None:
        """Raise ConfigError unless ``num_workers`` divides the global batch."""
        batch = self.run.global_batch
        if batch % num_workers:
            below = batch // num_workers * num_workers
            choices = " or ".join(str(n) for n in (below, below + num_workers) if n)
            raise ConfigError(
                "run.global_batch",
                f"must be divisible by the {num_workers} workers",
                value=batch,
                mend=f"Use {choices}, or --workers {_nearest_divisor(batch, num_workers)}",
            )

    def public(self) -> dict[str, Any]:
        """The configuration as JSON values; secrets in storage options masked, references kept."""
        values = self.model_dump(mode="json")
        for section in ("run", "data"):
            values[section]["storage_options"] = _masked(values[section]["storage_options"])
        return values

    def mathematics(self) -> dict[str, Any]:
        """The dotted keys whose change would change the result, and their values.

        Paths, workers, logging and evaluation are not among them. ``run.total_samples`` is, only
        where the learning rate decays towards it.
        """
        flat = flatten(self.model_dump(mode="json"))
        exact = {key: value for key, value in flat.items() if key.startswith(_MATHEMATICS)}
        exact["data.lanes"] = self.lanes
        if self.optim.decay != "none":
            exact["run.total_samples"] = self.run.total_samples
        return exact

    def digest(self) -> str:
        """SHA-256 (hex) of :meth:`mathematics`."""
        return hashlib.sha256(json.dumps(self.mathematics(), sort_keys=True).encode()).hexdigest()


_MATHEMATICS = (
    "run.global_batch",
    "run.seed",
    "run.reduction",
    "data.resolution",
    "data.window_samples",
    "data.block_bytes",
    "model.",
    "game.",
    "optim.",
    "precision.",
)
_SECRET = re.compile(r"key|secret|token|passw|credential|auth|sas|connection_string", re.IGNORECASE)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _masked(options: dict[str, Any]) -> dict[str, Any]:
    masked: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            masked[key] = _masked(value)
        elif _SECRET.search(key) and not (isinstance(value, str) and REFERENCE.fullmatch(value)):
            masked[key] = "***"
        else:
            masked[key] = value
    return masked


def _nearest_divisor(number: int, wanted: int) -> int:
    return min(
        (n for n in range(1, number + 1) if number % n == 0), key=lambda n: (abs(n - wanted), n)
    )
