"""The sections and keys of a configuration, and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gatdist.config.fields import (
    NamedConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PlayerName,
    PositiveFloat,
    PositiveInt,
    Share,
    ShareBelow1,
    TwoPositiveInts,
    Vocabulary,
)


class Section(BaseModel):
    """Base of all sections: frozen, exact types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ConvergenceConfig(Section):
    """When to stop: a metric has not improved for long.

    Attributes:
        metric: one of ``evaluate.metrics``; lower is better.
        patience_samples: for so long it may be no better than its best.
        min_improvement: by which share of the best it must fall below it.
    """

    metric: str = "fid"
    patience_samples: PositiveInt
    min_improvement: NonNegativeFloat = 0.0


class RunConfig(Section):
    """How much is trained, in what portions, from which seed.

    Attributes:
        total_samples: real samples to show in all, over all workers; then the run ends.
        global_batch: real samples of a discriminator step, over all workers, which share it.
        seed: of all random numbers.
        log_every_samples: how often numbers are written and a picture is made, in samples.
        checkpoint_every_samples: how often a checkpoint is written.
        keep_checkpoints: so many of the newest are kept.
        keep_best_checkpoints: and so many with the lowest ``best_metric``; if above 0, one is
            written at every evaluation.
        best_metric: one of ``evaluate.metrics``.
        keep_every_samples: and the first at or after each multiple of this; 0: none.
        reduction: ``canonical`` sums gradients along one fixed tree, so that the result is the same
            bit for bit on any power of two of workers up to ``virtual_workers``; ``fast`` is the
            same within rounding.
        virtual_workers: a power of two: into so many parts ``canonical`` cuts the global batch.
        convergence: ends the run before ``total_samples``; None does not.
        storage_options: for the run directory, passed to fsspec; ``${env:NAME}`` is replaced at the
            moment of use and never written to a file.
    """

    total_samples: PositiveInt
    global_batch: PositiveInt = 64
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every_samples: PositiveInt = 4096
    checkpoint_every_samples: PositiveInt = 16384
    keep_checkpoints: PositiveInt = 2
    keep_best_checkpoints: NonNegativeInt = 0
    best_metric: str = "fid"
    keep_every_samples: NonNegativeInt = 0
    reduction: Literal["fast", "canonical"] = "fast"
    virtual_workers: PositiveInt = 4
    convergence: ConvergenceConfig | None = None
    storage_options: dict[str, Any] = {}


class DataConfig(Section):
    """Where the samples are and how they are read.

    Attributes:
        url: of the folder of a data set; ``builtin:digits`` and ``builtin:ring`` need no files.
        resolution: pictures of another size (height and width, or both at once) are cut to its
            aspect about their centre and resized; None takes them as they are.
        resize: by which filter.
        channels: 1 is gray and 3 is RGB; of sounds 1 is their mean. None: as the data set has it.
        length: so much of each is read: samples of a sound, bytes of a text (characters where there
            is a vocabulary), tokens.
        vocabulary: the characters that texts may hold, each once, at most 255; None reads texts as
            bytes, of which every text is made.
        interleave: lanes that the sample order is cut into. Each global batch takes equally many
            samples from each lane, so it must divide the batch. None: the largest divisor up to 64.
        shuffle_window_samples: samples of a lane that are shuffled together. None: as many as fit
            into 256 MiB for the windows of all lanes, at most 4096.
        block_bytes: neighbours in a shard of about this size are read together.
        prefetch_batches: so many are read ahead.
        decode_threads: in each worker.
        memory_bytes: the most that a worker keeps of the data set: fetched bytes, indexes, batches
            read ahead.
        cache_dir: a folder on a local disk where the workers of a host keep what they fetched from
            storage elsewhere. It may be shared by several runs.
        cache_bytes: the most that is kept there; what was not used for longest goes first.
        on_bad_sample: whether a sample that can't be read, even after it was fetched again, ends
            the run, or another one is shown instead, the same on any number of workers.
        bad_sample_budget: more different bad samples than this end the run all the same.
        storage_options: as ``run.storage_options``, for what is on the server or bucket of ``url``.
        shards_url: URL of the folder of the tars, in place of the manifest's; required where they
            are on another server or bucket than the manifest.
        shards_storage_options: as ``run.storage_options``, for ``shards_url``.
    """

    url: str
    resolution: PositiveInt | TwoPositiveInts | None = None
    resize: Literal["lanczos", "bicubic", "hamming", "bilinear", "box"] = "lanczos"
    channels: PositiveInt | None = None
    length: PositiveInt | None = None
    vocabulary: Vocabulary | None = None
    interleave: PositiveInt | None = None
    shuffle_window_samples: PositiveInt | None = None
    block_bytes: PositiveInt = 4 * 2**20
    prefetch_batches: PositiveInt = 4
    decode_threads: PositiveInt = 1
    memory_bytes: PositiveInt = 2**30
    cache_dir: str | None = None
    cache_bytes: PositiveInt = 64 * 2**30
    on_bad_sample: Literal["raise", "substitute"] = "raise"
    bad_sample_budget: NonNegativeInt = 100
    storage_options: dict[str, Any] = {}
    shards_url: str = ""
    shards_storage_options: dict[str, Any] = {}


class ModelConfig(Section):
    """The two players.

    Attributes:
        generator: a network's ``name``, and its options beside it.
        discriminator: likewise.
        latent_size: numbers of a latent.
        conditional: whether both players are told the class.
        spectral_norm: the players whose weights are all divided by their largest singular values.
        init_from: folder of another run, whose networks a fresh run starts from, to go on with
            other data.
        init_from_storage_options: likewise, where that is on another server than the run directory.
    """

    generator: NamedConfig = NamedConfig(name="residual")
    discriminator: NamedConfig = NamedConfig(name="residual")
    latent_size: PositiveInt = 64
    conditional: bool = False
    spectral_norm: list[PlayerName] = []
    init_from: str = ""
    init_from_storage_options: dict[str, Any] = {}


class PenaltyConfig(Section):
    """A penalty, every so many steps and as many times as strong.

    Attributes:
        strength: its factor in the loss.
        every_steps: it is due at every so many steps, and counts as many times.
        final_strength: where its strength falls or rises to, along half a cosine; None: it stays.
        change_samples: in the first so many samples.
    """

    strength: PositiveFloat
    every_steps: PositiveInt = 1
    final_strength: PositiveFloat | None = None
    change_samples: PositiveInt = 1


class GameConfig(Section):
    """Losses, penalties, augmentation, the update rule and the average of the generator.

    Attributes:
        loss: of both players.
        update_rule: which gradients are taken, in which order.
        rule_options: of the update rule itself, such as the strength of ``consensus``.
        order: who moves first in ``alternating``.
        latents: whether the players' phases of ``alternating`` draw their own, or share them.
        reuse_fakes: with shared latents, whether the generator's phase reuses the fakes of the
            discriminator's, which saves a forward pass and costs the memory of its activations.
        num_discriminator_steps: how often the discriminator moves, each time at a global batch of
            its own, before the generator does.
        penalties: by name.
        lazy_penalties: whether a penalty that is not due at every step joins the loss of its step,
            or has an optimizer step of its own, with Adam's settings corrected for it.
        augmentation: its ``name``, and its options beside it, of what the discriminator is shown.
        ema_half_life_samples: of the moving average of the generator, which is what is
            evaluated and sampled.
    """

    loss: str = "nonsaturating"
    update_rule: str = "alternating"
    rule_options: dict[str, Any] = {}
    order: Literal["discriminator_first", "generator_first"] = "discriminator_first"
    latents: Literal["fresh", "shared"] = "fresh"
    reuse_fakes: bool = False
    num_discriminator_steps: PositiveInt = 1
    penalties: dict[str, PenaltyConfig] = {}
    lazy_penalties: Literal["joined", "separate"] = "joined"
    augmentation: NamedConfig | None = None
    ema_half_life_samples: PositiveFloat = 10_000.0


class PlayerOptimConfig(Section):
    """One player's optimizer, its schedule, and how its gradients are gathered.

    Attributes:
        name: ``sgd`` for rules that need plain gradient descent.
        direction: what the optimizer follows: the gradient, or what ``optimistic`` or ``conjugate``
            make of it; None leaves it to the update rule.
        conjugate_beta: the formula for β of a conjugate direction.
        learning_rate: before its schedule.
        betas: of Adam.
        eps: of Adam.
        momentum: of ``sgd``.
        weight_decay: of Adam it is decoupled.
        clip_norm: bounds the 2-norm of the whole gradient; 0 leaves it alone.
        warmup_samples: the learning rate rises linearly for so long.
        decay: how it falls then.
        decay_start_samples: from here on.
        final_fraction: the share of it that is left at ``run.total_samples``.
        micro_batch: at most so many samples go through the networks at once in a worker; the
            gradients of a step's micro-batches are added up. None: all at once.
    """

    name: Literal["adam", "sgd"] = "adam"
    direction: Literal["gradient", "optimistic", "conjugate"] | None = None
    conjugate_beta: Literal["FR", "PR", "HS", "DY", "HZ", "FR-PR", "HS-DY"] = "PR"
    learning_rate: PositiveFloat = 2e-4
    betas: Annotated[list[ShareBelow1], Field(min_length=2, max_length=2)] = [0.0, 0.99]
    eps: PositiveFloat = 1e-8
    momentum: ShareBelow1 = 0.0
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: NonNegativeFloat = 0.0
    warmup_samples: NonNegativeInt = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_start_samples: NonNegativeInt = 0
    final_fraction: Share = 0.0
    micro_batch: PositiveInt | None = None


class OptimConfig(Section):
    """Both players' optimizers.

    Attributes:
        generator: its optimizer.
        discriminator: its optimizer.
    """

    generator: PlayerOptimConfig = PlayerOptimConfig()
    discriminator: PlayerOptimConfig = PlayerOptimConfig()


class PrecisionConfig(Section):
    """What the networks compute in.

    Attributes:
        dtype: ``float64`` is for tests; with bfloat16 and float16 the parameters stay float32
            (autocast), and float16's losses are scaled, alike on all workers.
        channels_last: lay pictures out so in memory; faster with bfloat16 and on GPUs.
        compile: the networks that ``torch.compile`` compiles.
        reduce_dtype: what gradients travel in between workers.
        cuda_graphs: on CUDA, record a step once and replay it: for networks so small that a step
            is over before the host has started its kernels. Gradients then travel between
            workers after a backward, not during it.
    """

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    channels_last: bool = False
    compile: list[PlayerName] = []
    reduce_dtype: Literal["full", "bfloat16"] = "full"
    cuda_graphs: bool = False


class MonitorConfig(Section):
    """What is shown of the run.

    Attributes:
        tensorboard: whether event files are written.
        grid_samples: samples in a picture; of sounds at most 16.
        profile_steps: the first step of which a profile is made and the first of which none is,
            counted from 0 since the run began: ``[100, 110]`` are ten steps.
    """

    tensorboard: bool = True
    grid_samples: PositiveInt = 100
    profile_steps: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)] | None = None


class HealthConfig(Section):
    """What to do about bad steps, and when to raise which alarm.

    A step whose reduced gradients are not finite never moves a parameter, nor does a spike. Under
    ``skip`` the run goes on. Under ``rollback`` it goes back, at the end of the tick, to its last
    checkpoint, and on from there with other noise. Under ``stop`` it ends. Alarms are judged on
    each tick's means.

    Attributes:
        nonfinite: what to do about gradients that are not finite.
        nonfinite_budget: more such steps in all end the run.
        spike: what to do about gradients that are far too large.
        spike_factor: whose norm exceeds its running mean so many times.
        spike_budget: more such steps in all end the run.
        rollback_budget: more rollbacks end the run.
        atomic: lets rules that move one player after the other take back the first's move if the
            second's gradients are bad; it costs a copy of the first and its optimizer's state.
        vanishing_norm: an alarm below this norm of a player's gradient.
        exploding_norm: an alarm above it.
        collapse_ratio: an alarm where fakes deviate over the batch by less than this share of what
            real samples do.
        won_accuracy: an alarm where the discriminator ranks more than this share of the (real,
            fake) pairs rightly.
        straggler_factor: an alarm where a worker works at a step so many times as long as others.
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

    @property
    def may_roll_back(self) -> bool:
        """Whether the run may go back to a checkpoint."""
        return "rollback" in (self.nonfinite, self.spike)


class EvaluateConfig(Section):
    """Which metrics, on how many samples, how often (0: at the end only).

    Attributes:
        metrics: by name; an empty list measures nothing.
        num_samples: fakes; None: as many as there are real samples.
        every_samples: how often; 0: at the end only.
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
        backend: of the process group; ``auto``: NCCL on GPUs, else Gloo.
        gpus_per_worker: None takes one where there are any; must be said where an autoscaler is yet
            to bring them.
        cpus_per_worker: also the threads that each computes with.
        resources_per_worker: others that Ray's hosts offer, by name.
        placement: how Ray spreads the workers over the hosts.
        labels: that a host must have, as Ray's label selectors are written.
        runtime_env: Ray's description of what workers need beside gatdist (``pip``,
            ``working_dir``, ``env_vars`` …). Plugins that are not installed are sent along.
        heartbeat_timeout_s: Seconds without a heartbeat after which a worker counts as hung. Steps
            and every part of an evaluation, a commit or a read are heartbeats, so that this limits
            the longest part, not the whole.
        startup_timeout_s: The same limit from a worker's start to the end of its first step
            (imports, plugins, reading the checkpoint), while networks are compiled or CUDA graphs
            recorded, while a profile is written or a run is rolled back, and while a worker waits
            until its checkpoint is written.
        straggler_warn_s: one that does so for so long is named, with the stacks of all workers.
        max_failures: so many failures in a row without a new checkpoint between them are borne.
        wait_for_workers_s: for how long a run waits for hosts to come back; with an autoscaler,
            also for the first to come.
    """

    workers: PositiveInt | TwoPositiveInts = 1
    address: str = ""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    gpus_per_worker: NonNegativeInt | None = None
    cpus_per_worker: PositiveInt = 1
    resources_per_worker: dict[str, PositiveFloat] = {}
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    labels: dict[str, str] = {}
    runtime_env: dict[str, Any] = {}
    heartbeat_timeout_s: PositiveFloat = 120.0
    startup_timeout_s: PositiveFloat = 1800.0
    straggler_warn_s: PositiveFloat = 15.0
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
