"""The sections and keys of a configuration, and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PlayerName = Literal["generator", "discriminator"]
BOTH: tuple[PlayerName, PlayerName] = ("generator", "discriminator")


class Section(BaseModel):
    """Base of all sections: frozen, exact types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _vocabulary(characters: str) -> str:
    if len(set(characters)) < len(characters):
        raise PydanticCustomError("vocabulary", "must hold each character once")
    if not 1 <= len(characters) <= 255 or "\0" in characters:
        raise PydanticCustomError(
            "vocabulary", "must hold 1 to 255 characters, the character 0 not among them"
        )
    return characters


class ConvergenceConfig(Section):
    """When to stop: ``metric`` has not improved for ``patience_samples``.

    An improvement is a value below the best so far by ``min_improvement``, a share of it.
    """

    metric: str = "fid"
    patience_samples: PositiveInt
    min_improvement: NonNegativeFloat = 0.0


class RunConfig(Section):
    """How much is trained, in what portions, from which seed.

    ``reduction = "canonical"`` cuts the global batch into ``reduction_lanes`` lanes (a power of
    two) and sums them along one fixed tree, so that the result is the same, bit for bit, on any
    power of two of workers up to the number of lanes. ``fast`` is the same within rounding.

    Kept are the newest ``keep_checkpoints``, the ``keep_best_checkpoints`` with the lowest
    ``best_metric`` (then a checkpoint is made at every evaluation), and the first at or after each
    multiple of ``keep_every_samples``.
    """

    total_samples: PositiveInt
    global_batch: PositiveInt = 64
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tick_samples: PositiveInt = 4096
    checkpoint_samples: PositiveInt = 16384
    keep_checkpoints: PositiveInt = 2
    keep_best_checkpoints: NonNegativeInt = 0
    best_metric: str = "fid"
    keep_every_samples: NonNegativeInt = 0
    reduction: Literal["fast", "canonical"] = "fast"
    reduction_lanes: PositiveInt = 4
    convergence: ConvergenceConfig | None = None
    storage_options: dict[str, Any] = {}


class DataConfig(Section):
    """Where the samples are and how they are read.

    ``builtin:digits`` and ``builtin:ring`` need no files.

    Attributes:
        resolution: pictures of another size (height and width, or both at once) are cut to its
            aspect about their centre and resized; None takes them as they are.
        resize: by which filter.
        channels: 1 is gray and 3 is RGB; of sounds 1 is their mean. None: as the data set has it.
        length: so much of each is read: samples of a sound, bytes of a text (characters where there
            is a vocabulary), tokens.
        vocabulary: the characters that texts may hold, each once, at most 255; None reads texts as
            bytes, of which every text is made.
        window_samples: so many samples of a lane are shuffled together; None: so many that the
            windows of all lanes take 256 MiB, at most 4096.
        memory_bytes: the most that a worker keeps of the data set: fetched bytes, indexes, batches
            read ahead.
        cache_dir: a folder on a local disk where the workers of a host keep what they fetched from
            storage elsewhere. It may be shared by several runs.
        cache_bytes: the most that is kept there; what was not used for longest goes first.
        on_bad_sample: whether a sample that can't be read, even after it was fetched again, ends
            the run, or another one is shown instead, the same on any number of workers.
        bad_sample_budget: more different bad samples than this end the run all the same.
    """

    url: str
    resolution: (
        PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None
    ) = None
    resize: Literal["lanczos", "bicubic", "hamming", "bilinear", "box"] = "lanczos"
    channels: PositiveInt | None = None
    length: PositiveInt | None = None
    vocabulary: Annotated[str, AfterValidator(_vocabulary)] | None = None
    lanes: PositiveInt | None = None
    window_samples: PositiveInt | None = None
    block_bytes: PositiveInt = 4 * 2**20
    prefetch_batches: PositiveInt = 4
    decode_threads: PositiveInt = 1
    memory_bytes: PositiveInt = 2**30
    cache_dir: str | None = None
    cache_bytes: PositiveInt = 64 * 2**30
    on_bad_sample: Literal["raise", "substitute"] = "raise"
    bad_sample_budget: NonNegativeInt = 100
    storage_options: dict[str, Any] = {}


class NamedConfig(BaseModel):
    """Something registered and its own options, which its builder's signature checks."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside ``name``."""
        return dict(self.model_extra or {})


class ModelConfig(Section):
    """The two players.

    Those in ``spectral_norm`` have all their weights divided by their norms. ``init_from`` is the
    folder of another run, whose networks a fresh run starts from, to go on with other data.
    """

    generator: NamedConfig = NamedConfig(name="residual")
    discriminator: NamedConfig = NamedConfig(name="residual")
    latent_size: PositiveInt = 64
    conditional: bool = False
    spectral_norm: list[PlayerName] = []
    init_from: str = ""


class PenaltyConfig(Section):
    """A penalty, every so many steps and as many times as strong.

    Its strength falls (or rises) along half a cosine to ``final_strength`` in the first
    ``change_samples`` samples; None leaves it as it is.
    """

    strength: PositiveFloat
    every_steps: PositiveInt = 1
    final_strength: PositiveFloat | None = None
    change_samples: PositiveInt = 1


class GameConfig(Section):
    """Losses, penalties, augmentation, the update rule and the average of the generator.

    Attributes:
        rule_options: of the update rule itself, such as the strength of ``consensus``.
        latents: whether the players' phases of ``alternating`` draw their own, or share them.
        keep_fakes: with shared latents, whether the generator's phase goes on from the fakes of the
            discriminator's, which saves a forward and costs the memory of its activations.
        num_discriminator_steps: how often the discriminator moves, each time at a global batch of
            its own, before the generator does.
        lazy_penalties: whether a penalty that is not due at every step joins the loss of its step,
            or has an optimizer step of its own, with Adam's settings corrected for it.
    """

    loss: str = "nonsaturating"
    update_rule: str = "alternating"
    rule_options: dict[str, Any] = {}
    order: Literal["discriminator_first", "generator_first"] = "discriminator_first"
    latents: Literal["fresh", "shared"] = "fresh"
    keep_fakes: bool = False
    num_discriminator_steps: PositiveInt = 1
    penalties: dict[str, PenaltyConfig] = {}
    lazy_penalties: Literal["joined", "separate"] = "joined"
    augmentation: NamedConfig | None = None
    averaging_half_life_samples: PositiveFloat = 10_000.0


class PlayerOptimConfig(Section):
    """One player's optimizer, its schedule, and how its gradients are gathered.

    Attributes:
        direction: what the optimizer follows: the gradient, or what ``optimistic`` or ``conjugate``
            make of it; None leaves it to the update rule.
        conjugate_beta: the formula for β of a conjugate direction.
        clip_norm: bounds the 2-norm of the whole gradient; 0 leaves it alone.
        warmup_samples: the learning rate rises linearly for so long.
        decay: then, from ``decay_start_samples`` on, falls like this, and ends at
            ``run.total_samples`` with ``final_fraction`` of the rate.
        micro_batch: at most so many samples go through the networks at once in a worker; the
            gradients of a step's micro-batches are added up. None: all at once.
    """

    name: Literal["adam", "sgd"] = "adam"
    direction: Literal["gradient", "optimistic", "conjugate"] | None = None
    conjugate_beta: Literal["FR", "PR", "HS", "DY", "HZ", "FR-PR", "HS-DY"] = "PR"
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
    warmup_samples: NonNegativeInt = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_start_samples: NonNegativeInt = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    micro_batch: PositiveInt | None = None


class OptimConfig(Section):
    """Both players' optimizers."""

    generator: PlayerOptimConfig = PlayerOptimConfig()
    discriminator: PlayerOptimConfig = PlayerOptimConfig()


class PrecisionConfig(Section):
    """What the networks compute in.

    Attributes:
        dtype: float64 is for tests; with bfloat16 and float16 the parameters stay float32
            (autocast), and float16's losses are scaled, alike on all workers.
        channels_last: lay pictures out so in memory; faster with bfloat16 and on GPUs.
        compile: the networks that ``torch.compile`` compiles.
        reduce_dtype: what gradients travel in between workers.
    """

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    channels_last: bool = False
    compile: list[PlayerName] = []
    reduce_dtype: Literal["full", "bfloat16"] = "full"


class MonitorConfig(Section):
    """What is shown of the run.

    Attributes:
        tensorboard: whether event files are written.
        grid_samples: how many samples are shown at each tick.
        profile_steps: the first step of which a profile is made and the first of which none is,
            counted from 0 since the run began: ``[100, 110]`` are ten steps.
    """

    tensorboard: bool = True
    grid_samples: PositiveInt = 100
    profile_steps: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)] | None = None


class HealthConfig(Section):
    """What to do about bad steps, and when to raise which alarm.

    A step whose reduced gradients are not finite never moves a parameter, nor does a spike: one
    whose norm exceeds ``spike_factor`` times its running mean. Under ``skip`` the run goes on.
    Under ``rollback`` it goes back, at the end of the tick, to its last checkpoint, and on from
    there with other noise. Under ``stop`` it ends. When more than ``nonfinite_budget`` (or
    ``spike_budget``) steps were skipped in all, or ``rollback_budget`` rollbacks made, it ends too.

    ``atomic`` lets rules that move the players one after the other take back the first's move if
    the second's gradients are bad; it costs a copy of the first player and its optimizer's state.

    Alarms are judged on each tick's means: gradient norms below ``vanishing_norm`` or above
    ``exploding_norm``; fakes whose deviation over the batch is less than ``collapse_ratio`` of the
    real samples'; a discriminator that ranks more than ``won_accuracy`` of the (real, fake) pairs
    rightly; a worker that works at a step ``straggler_factor`` times as long as the others.
    """

    nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    nonfinite_budget: NonNegativeInt = 20
    spike: Literal["off", "skip", "rollback", "stop"] = "off"
    spike_factor: Annotated[float, Field(gt=1)] = 20.0
    spike_budget: NonNegativeInt = 200
    rollback_budget: NonNegativeInt = 5
    atomic: bool = False
    vanishing_norm: NonNegativeFloat = 1e-6
    exploding_norm: PositiveFloat = 1e4
    collapse_ratio: NonNegativeFloat = 0.1
    won_accuracy: Annotated[float, Field(gt=0.5, le=1)] = 0.99
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5


class EvaluateConfig(Section):
    """Which metrics, on how many samples, how often (0: at the end only).

    Attributes:
        features: what samples are compared by.
        features_file: URL of the network of the features ``inception`` (safetensors) or
            ``torchscript``.
        features_sha256: its digest, in hex.
    """

    metrics: list[str] = ["fid", "kid"]
    num_samples: PositiveInt | None = None
    every_samples: NonNegativeInt = 0
    features: str = "classifier"
    features_file: str = ""
    features_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


class ClusterConfig(Section):
    """Workers, what they need, how they reach one another, and what is borne.

    Attributes:
        workers: how many; ``[min, max]`` lets the run go on with fewer when hosts go, and take in
            those that come.
        address: of a Ray cluster; "" starts Ray on this machine.
        gpus_per_worker: None takes one where there are any.
        resources_per_worker: others that Ray's hosts offer, by name.
        placement: how Ray spreads the workers over the hosts.
        labels: that a host must have, as Ray's label selectors are written.
        runtime_env: Ray's description of what the workers need beside gatdist (``pip``,
            ``working_dir``, ``env_vars`` …). Plugins outside of the environment travel by
            themselves.
        timeout_s: a worker that does not move, or is silent, for so long is lost.
        late_s: one that does so for so long is named, with the stacks of all workers.
        max_failures: so many failures in a row without a new checkpoint between them are borne.
        wait_for_workers_s: for how long a run waits for hosts to come back; with an autoscaler,
            also for the first to come.
    """

    workers: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] = 1
    address: str = ""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    gpus_per_worker: NonNegativeInt | None = None
    cpus_per_worker: PositiveInt = 1
    resources_per_worker: dict[str, PositiveFloat] = {}
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    labels: dict[str, str] = {}
    runtime_env: dict[str, Any] = {}
    timeout_s: PositiveFloat = 120.0
    late_s: PositiveFloat = 15.0
    max_failures: NonNegativeInt = 8
    wait_for_workers_s: NonNegativeFloat = 600.0

    @property
    def min_workers(self) -> int:
        """The fewest that the run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most that it takes in."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]
