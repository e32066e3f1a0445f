"""The sections and keys of a configuration, and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from gatdist.config.schedule import (
    DecayRateSchedule,
    NonNegativeInt,
    NonNegativeSchedule,
    PositiveSchedule,
    Schedule,
    fits_int64,
)


def _is_vocabulary(characters: str) -> str:
    if len(set(characters)) < len(characters):
        raise PydanticCustomError("vocabulary", "must hold each character once")
    if not 1 <= len(characters) <= 255 or "\0" in characters:
        raise PydanticCustomError("vocabulary", "must hold 1 to 255 characters, and no NUL")
    return characters


PositiveInt = Annotated[int, Field(gt=0), AfterValidator(fits_int64)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
TwoPositiveInts = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Share = Annotated[float, Field(ge=0, le=1)]
TermName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
FieldName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
ShareBelow1 = Annotated[float, Field(ge=0, lt=1)]
Vocabulary = Annotated[str, AfterValidator(_is_vocabulary)]
PlayerName = Literal["generator", "discriminator"]
BatchNormStatistics = Literal["averaged", "recomputed", "live"]
LatentDistribution = Literal["normal", "uniform"]
BOTH: tuple[PlayerName, PlayerName] = ("generator", "discriminator")


class NamedConfig(BaseModel):
    """A registered ``name`` with its own options."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys other than ``name``."""
        return dict(self.model_extra or {})


class Section(BaseModel):
    """Base of all sections: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ConvergenceConfig(Section):
    """Stop early when a metric no longer improves."""

    metric: str = "fid"
    """Metric to watch, one of ``evaluate.metrics``. Lower is better, except of metrics such as
    ``psnr`` that are documented otherwise."""
    patience_samples: PositiveInt
    """Training samples without an improvement after which the run ends."""
    min_improvement: NonNegativeFloat = 0.0
    """Smallest relative change from the best value that counts as an improvement."""


class RunConfig(Section):
    """Length of training, batch size, seed, checkpoints and reproducibility."""

    total_samples: PositiveInt
    """Real samples shown in total, summed over all workers. The run then ends."""
    global_batch: PositiveInt = 64
    """Samples per discriminator step, summed over all workers."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers."""
    log_every_samples: PositiveInt | Literal["auto"] = "auto"
    """Samples per log interval. Metrics and a preview are written after each. ``auto``: 4,096, and
    at least those of 50 steps."""
    checkpoint_every_samples: PositiveInt | Literal["auto"] = "auto"
    """Samples between two checkpoints. ``auto`` chooses a number of log intervals that take at most
    30 minutes, from what a checkpoint costs and how often the run was started. Runs that may be
    rolled back need a number."""
    keep_checkpoints: PositiveInt = 2
    """Number of recent checkpoints to keep."""
    keep_best_checkpoints: NonNegativeInt = 0
    """Number of checkpoints with the best ``best_metric`` to keep in addition. Above 0, every
    evaluation writes a checkpoint."""
    best_metric: str = "fid"
    """Metric that ranks the best checkpoints, one of ``evaluate.metrics``."""
    keep_every_samples: NonNegativeInt = 0
    """Keep the first checkpoint at or after each multiple of this many samples for good. 0 disables
    it."""
    reduction: Literal["fast", "canonical"] = "fast"
    """How gradients are summed over workers. ``fast`` uses all-reduce: results on different numbers
    of workers agree within rounding. ``canonical`` sums along one fixed tree: results are
    bit-identical on 1 to ``virtual_workers`` workers. On CUDA, ``canonical`` uses deterministic
    kernels, and ends a run whose networks have operators without one."""
    virtual_workers: PositiveInt = 4
    """Number of parts, a power of two, that ``canonical`` cuts the global batch into. Ignored under
    ``fast``."""
    convergence: ConvergenceConfig | None = None
    """End the run before ``total_samples`` when a metric stops improving. None trains to the
    end."""
    storage_options: dict[str, Any] = {}
    """Options passed to fsspec for the run directory. ``${env:NAME}`` is replaced when it is used
    and never written to a file."""


class UnpairedConfig(Section):
    """A further data set; see ``data.unpaired``. Keys as in ``data``."""

    url: str
    """Folder of the data set."""
    resolution: PositiveInt | TwoPositiveInts | None = None
    """Height and width in pixels. See ``data.resolution``."""
    resize: Literal["lanczos", "bicubic", "hamming", "bilinear", "box"] = "lanczos"
    """Resampling filter."""
    channels: PositiveInt | None = None
    """Channels of an image or of audio. See ``data.channels``."""
    length: PositiveInt | None = None
    """Length read of each sample. See ``data.length``."""
    storage_options: dict[str, Any] = {}
    """Options passed to fsspec for the server or bucket of ``url``. Those of ``data`` apply too if
    it is the same one. See ``run.storage_options``."""
    shards_url: str = ""
    """Folder of the tar files. See ``data.shards_url``."""
    shards_storage_options: dict[str, Any] = {}
    """Options passed to fsspec for ``shards_url``. See ``run.storage_options``."""


class DataConfig(Section):
    """Location of the data set, preprocessing, shuffling, read-ahead and caching."""

    url: str
    """Folder of the data set. ``builtin:digits`` and ``builtin:ring`` need no files."""
    resolution: PositiveInt | TwoPositiveInts | None = None
    """Height and width in pixels, as one number for both or ``[height, width]``. Images of another
    size are center-cropped to this aspect ratio and resized. None keeps their size."""
    resize: Literal["lanczos", "bicubic", "hamming", "bilinear", "box"] = "lanczos"
    """Resampling filter."""
    dequantize: bool = False
    """Whether to add uniform noise of one quantization level, centered on 0, to the images that the
    discriminator is trained on (Theis et al. 2016). The noise is a function of the position."""
    x_flip: bool = False
    """Whether to mirror each image that the discriminator is trained on, left to right, with
    probability ½. The choice is a function of the position. Evaluation uses unmirrored images, as
    StyleGAN2-ADA and R3GAN do."""
    channels: PositiveInt | None = None
    """Channels of an image (1 gray, 3 RGB) or of audio (1 mixes to mono). None keeps those of the
    data set."""
    length: PositiveInt | None = None
    """Length read of each sample: audio samples, bytes of text (characters with a ``vocabulary``)
    or tokens."""
    vocabulary: Vocabulary | None = None
    """Characters of the text, each once, at most 255. None reads text as bytes."""
    held_out: ShareBelow1 = 0.0
    """Share of the samples that are never trained on. Evaluation and previews use them instead. A
    hash of a sample's key decides, so that the choice stays the same after packing again. Clips of
    one recording, whose keys end in a hyphen and five digits, stay together."""
    interleave: PositiveInt | None = None
    """Number of sequential read streams that make up a global batch. Each contributes equally many
    samples, so it must divide ``run.global_batch``. None uses the largest divisor up to 64."""
    shuffle_window_samples: PositiveInt | None = None
    """Samples of one read stream that are shuffled together. None uses as many as fit into 256 MiB
    for the windows of all streams, at most 4096."""
    block_bytes: PositiveInt = 4 * 2**20
    """Approximate size in bytes of one read from a shard. Neighboring samples are read together."""
    prefetch_batches: PositiveInt = 4
    """Number of batches that each worker reads ahead."""
    decode_threads: PositiveInt | None = None
    """Decoding threads per worker. None uses 1 if the worker trains on a CPU. On a GPU, it uses the
    worker's share of the cores that this host allows, less one, at most 16."""
    memory_bytes: PositiveInt = 2**30
    """Memory limit per worker, in bytes, for fetched data, indexes and batches read ahead."""
    cache_dir: str | None = None
    """Folder on a local disk where all workers of a host cache data from remote storage. Several
    runs may share it. None disables the cache."""
    cache_bytes: PositiveInt = 64 * 2**30
    """Size limit of ``cache_dir`` in bytes. The least recently used data is evicted first."""
    on_bad_sample: Literal["raise", "substitute"] = "raise"
    """What to do with a sample that can't be read, even after fetching it again. ``raise`` ends the
    run. ``substitute`` shows another sample, the same one on any number of workers."""
    bad_sample_budget: NonNegativeInt = 100
    """Number of different bad samples that ``substitute`` tolerates. One more ends the run."""
    storage_options: dict[str, Any] = {}
    """Options passed to fsspec for the server or bucket of ``url``. See ``run.storage_options``."""
    shards_url: str = ""
    """Folder of the tar files, instead of the one in the manifest. Required if they are on another
    server or bucket than the manifest."""
    shards_storage_options: dict[str, Any] = {}
    """Options passed to fsspec for ``shards_url``. See ``run.storage_options``."""
    unpaired: dict[FieldName, UnpairedConfig] = {}
    """Further data sets by name: their samples, in an order of their own, become fields of these
    names. They share ``memory_bytes``, and the settings of ``data`` that they do not have."""


class ModelConfig(Section):
    """The generator, the discriminator and their initial weights."""

    generator: NamedConfig = NamedConfig(name="residual")
    """Generator network: its ``name`` and its options."""
    discriminator: NamedConfig = NamedConfig(name="residual")
    """Discriminator network: its ``name`` and its options."""
    latent_size: PositiveInt = 64
    """Number of components of a latent vector."""
    latent_distribution: LatentDistribution = "normal"
    """Distribution of the components: ``normal`` N(0, 1), or ``uniform`` between −1 and 1."""
    conditional: bool = False
    """Whether both networks are class-conditional."""
    spectral_norm: list[PlayerName] = []
    """Networks whose weights are spectrally normalized (divided by their largest singular
    value)."""
    init_from: str = ""
    """Run directory to take initial weights from, for fine-tuning on other data. Ignored when the
    run resumes."""
    init_from_strict: bool = True
    """Whether the networks of ``init_from`` must be those of this run. If false, every weight that
    both have with the same shape is copied, and others are initialized: for another resolution or
    number of classes."""
    init_from_storage_options: dict[str, Any] = {}
    """Options passed to fsspec for ``init_from``, if it is on another server than the run
    directory."""


class PenaltyConfig(Section):
    """A penalty, computed lazily: every N steps with N times its strength."""

    strength: PositiveSchedule
    """Weight in the loss, above 0."""
    every_steps: PositiveInt = 1
    """Steps between two evaluations of the penalty. Its weight is multiplied by the same number."""


class TermConfig(BaseModel):
    """A term of the generator's loss, with the options of its kind."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    weight: NonNegativeSchedule
    """Factor of the term in the generator's loss."""
    start_samples: NonNegativeInt = 0
    """Samples after which the term counts."""
    term: str | None = None
    """Kind of the term; None: its name."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys of its kind."""
        return dict(self.model_extra or {})


class GameConfig(Section):
    """Loss, penalties, augmentation, update rule and the generator's moving average."""

    loss: str = "nonsaturating"
    """Loss of both players."""
    update_rule: str = "alternating"
    """Which gradients are taken and in which order."""
    rule_options: dict[str, Any] = {}
    """Options of the update rule, such as the strength of ``consensus``."""
    order: Literal["discriminator_first", "generator_first"] = "discriminator_first"
    """Which player steps first under ``alternating``."""
    latents: Literal["fresh", "shared"] = "fresh"
    """Whether the two players of ``alternating`` draw their own latents (``fresh``) or use the same
    (``shared``)."""
    reuse_fakes: bool = False
    """Reuse the discriminator phase's fakes in the generator phase. Needs shared latents. Saves one
    forward pass and costs the memory of its activations."""
    num_discriminator_steps: PositiveInt = 1
    """Discriminator steps per generator step. Each uses its own global batch."""
    generator_batch: PositiveInt | None = None
    """Samples per generator step under ``alternating``, summed over all workers, at most those of
    its discriminator steps. None uses ``run.global_batch``."""
    task: NamedConfig = NamedConfig(name="generation")
    """What the generator receives and the discriminator sees."""
    terms: dict[TermName, TermConfig] = {}
    """Terms of the generator's loss besides the adversarial one, by name."""
    adversarial_weight: NonNegativeSchedule = Schedule.constant(1.0)
    """Factor of the adversarial loss in the generator's loss."""
    penalties: dict[str, PenaltyConfig] = {}
    """Penalties by name."""
    lazy_penalties: Literal["joined", "separate"] = "joined"
    """Whether a penalty with ``every_steps`` above 1 is added to the loss of its step (``joined``)
    or gets its own optimizer step, with Adam's settings corrected for it (``separate``)."""
    augmentation: NamedConfig | None = None
    """Augmentation of what the discriminator sees: its ``name`` and its options."""
    ema_half_life_samples: NonNegativeSchedule = Schedule.constant(10_000.0)
    """Half-life in samples of the generator's exponential moving average, which is evaluated and
    sampled. While it is 0, the average equals the generator."""
    ema_batch_norm: BatchNormStatistics = "averaged"
    """Running statistics of batch normalization in the averaged generator: ``averaged`` like its
    weights; ``recomputed`` as means over 16 generated batches whenever it is evaluated, shown or
    saved ("standing statistics", Brock et al. 2019); ``live``, copied from the generator that is
    trained."""


class PlayerOptimConfig(Section):
    """Optimizer, learning-rate schedule and gradient accumulation of one player."""

    name: Literal["adam", "sgd"] = "adam"
    """Optimizer. Some update rules need plain gradient descent, ``sgd``."""
    direction: Literal["gradient", "optimistic", "conjugate"] | None = None
    """What the optimizer receives: the gradient, or the ``optimistic`` or ``conjugate`` direction
    computed from it. None leaves the choice to the update rule."""
    conjugate_beta: Literal["FR", "PR", "HS", "DY", "HZ", "FR-PR", "HS-DY"] = "PR"
    """Formula for β of a conjugate direction."""
    learning_rate: PositiveSchedule = Schedule.constant(2e-4)
    """Learning rate, above 0."""
    betas: Annotated[list[DecayRateSchedule], Field(min_length=2, max_length=2)] = [
        Schedule.constant(0.0),
        Schedule.constant(0.99),
    ]
    """Adam's decay rates β₁ and β₂, from 0 to below 1."""
    eps: PositiveFloat = 1e-8
    """Adam's ε."""
    momentum: ShareBelow1 = 0.0
    """Momentum of ``sgd``."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, decoupled under Adam (AdamW)."""
    clip_norm: NonNegativeFloat = 0.0
    """Upper bound of the 2-norm of the whole gradient. 0 disables clipping."""
    freeze: list[str] = []
    """Parameters that are not trained: names, or patterns such as ``mapping.*``."""
    micro_batch: PositiveInt | None = None
    """Largest number of samples per forward and backward pass in a worker. Gradients are
    accumulated over the micro-batches of a step. None uses one pass."""


class OptimConfig(Section):
    """Optimizers of both players."""

    generator: PlayerOptimConfig = PlayerOptimConfig()
    """The generator's optimizer."""
    discriminator: PlayerOptimConfig = PlayerOptimConfig()
    """The discriminator's optimizer."""


class PrecisionConfig(Section):
    """Number formats, memory layout, compilation and CUDA graphs."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Format of the computation. bfloat16 and float16 use autocast with float32 parameters, float16
    also scales the loss. ``float64`` is for tests."""
    tf32: bool = False
    """Round the inputs of float32 convolutions and matrix products to TF32 (10 bits) on CUDA, which
    is faster. Evaluations never do."""
    channels_last: bool = False
    """Use the channels-last memory layout for images. Faster with bfloat16 and on GPUs."""
    compile: list[PlayerName] = []
    """Networks to compile with ``torch.compile``."""
    reduce_dtype: Literal["full", "bfloat16"] = "full"
    """Format in which gradients are sent between workers. ``full`` is the parameters' own."""
    cuda_graphs: bool = False
    """On CUDA, record a step once as a graph and replay it. Pays for small networks that are bound
    by kernel launches. Gradients are then sent after the backward pass instead of during it."""


class MonitorConfig(Section):
    """TensorBoard, previews and profiles."""

    tensorboard: bool = True
    """Whether to write TensorBoard event files."""
    grid_samples: PositiveInt = 100
    """Samples in a preview. Of audio, at most 16 are shown. Of tasks whose generator takes inputs,
    at most 24 images or 8 clips are shown, each beside its inputs and its target."""
    profile_steps: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)] | None = None
    """Steps to profile: the first one and the one after the last, counted from 0. ``[100, 110]``
    profiles ten steps. None profiles none."""


class HealthConfig(Section):
    """Responses to non-finite gradients and spikes, and thresholds of alarms.

    A step with a non-finite reduced gradient, or with a spike, is skipped on every rank. The run
    then continues (``skip``), returns to its last checkpoint at the end of the log interval and
    continues with other noise (``rollback``), or ends (``stop``). Alarms compare the means of each
    log interval with their thresholds.
    """

    nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """Response to a non-finite gradient."""
    nonfinite_budget: NonNegativeInt = 20
    """Number of such steps that a run tolerates. One more ends it."""
    spike: Literal["off", "skip", "rollback", "stop"] = "off"
    """Response to a gradient spike."""
    spike_factor: Annotated[float, Field(gt=1)] = 20.0
    """Ratio of a gradient's norm to its running mean above which it is a spike."""
    spike_budget: NonNegativeInt = 200
    """Number of such steps that a run tolerates. One more ends it."""
    rollback_budget: NonNegativeInt = 5
    """Number of rollbacks that a run tolerates. One more ends it."""
    atomic: bool = False
    """Undo the first player's update if the second player's gradient is bad, under update rules
    that step them in turn. Costs a copy of the first player and its optimizer state."""
    vanishing_norm: NonNegativeFloat = 1e-6
    """Alarm if the norm of a player's gradient is below this."""
    exploding_norm: PositiveFloat = 1e4
    """Alarm if the norm of a player's gradient is above this."""
    collapse_ratio: NonNegativeFloat = 0.1
    """Alarm if the fakes' standard deviation over the batch is below this share of the real
    samples'."""
    won_accuracy: Annotated[float, Field(gt=0.5, le=1)] = 0.99
    """Alarm if the discriminator ranks more than this share of (real, fake) pairs correctly, unless
    ``game.terms`` are at least half of the generator's loss."""
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5
    """Alarm if a worker computes this many times as long per step as the others."""
    lost_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alarm if changes of workers, and the steps that they undid, took more than this share of an
    hour."""

    @property
    def may_roll_back(self) -> bool:
        """Whether the run may return to a checkpoint."""
        return "rollback" in (self.nonfinite, self.spike)


class EvaluateConfig(Section):
    """Metrics, their samples and features, and how often they are measured."""

    metrics: list[str] = ["fid", "kid"]
    """Names of the metrics. An empty list disables evaluation."""
    url: str = ""
    """Folder of a data set to evaluate and preview, in the format of ``data.url``. Excludes
    ``data.held_out``. Without either, the training data is used."""
    storage_options: dict[str, Any] = {}
    """Options passed to fsspec for the server or bucket of ``url``. See ``run.storage_options``."""
    num_samples: PositiveInt | None = None
    """Number of fakes per evaluation. None uses as many as there are real samples. A task whose
    generator takes inputs uses those of the first samples."""
    num_real: Annotated[int, Field(ge=2)] | None = None
    """Number of real samples that fakes are compared with, from evenly spaced places of the data.
    None uses all. Workers hold the features of all of them in memory."""
    every_samples: NonNegativeInt = 0
    """Training samples between two evaluations. 0 evaluates at the end only."""
    features: str = "classifier"
    """Feature extractor that samples are compared by."""
    features_file: str = ""
    """URL of the network file for the features ``inception`` (the published ``.pth``, or
    safetensors) or ``torchscript``."""
    features_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the file, in hex. Required with ``features_file``, except for the published
    Inception weights."""


class ClusterConfig(Section):
    """Workers, their resources, the network between them and fault tolerance."""

    workers: PositiveInt | TwoPositiveInts = 1
    """Number of workers, at most ``run.global_batch``, and at most ``run.virtual_workers`` under
    ``canonical``. ``[min, max]`` makes the run elastic: it continues with fewer when hosts leave
    and grows when hosts join."""
    address: str = ""
    """HOST:PORT of a Ray cluster. Empty starts Ray on this machine."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library. ``auto`` uses NCCL on GPUs, else Gloo."""
    gpus_per_worker: NonNegativeInt | None = None
    """GPUs per worker. None uses 1 if the cluster has GPUs, else 0. Required if an autoscaler has
    yet to add the GPU hosts."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores per worker, and its number of torch threads."""
    bind_cpus: bool = False
    """Restrict each worker's threads to its share of the cores near its GPU (NUMA node), unless the
    launcher has divided the cores. ``attempts.jsonl`` has the shares, bound or not."""
    resources_per_worker: dict[str, PositiveFloat] = {}
    """Custom Ray resources per worker, by name."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Ray's strategy for placing workers on hosts."""
    labels: dict[str, str] = {}
    """Node labels that a host must have, as Ray label selectors."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the workers (``pip``, ``working_dir``, ``env_vars`` …). Plugins
    that are not installed are added."""
    heartbeat_timeout_s: PositiveFloat = 120.0
    """Seconds without a heartbeat after which a worker counts as hung. Steps and every part of an
    evaluation, a commit or a read are heartbeats, so that this limits the longest part, not the
    whole."""
    startup_timeout_s: PositiveFloat = 1800.0
    """The same limit from a worker's start to the end of its first step (imports, plugins, reading
    the checkpoint), while networks are compiled or CUDA graphs recorded, while a profile is written
    or a run is rolled back, and while a worker waits until its checkpoint is written."""
    straggler_warn_s: PositiveFloat = 15.0
    """Seconds without a heartbeat after which a worker is reported as a straggler, with the stacks
    of all workers."""
    max_failures: NonNegativeInt = 8
    """Failures that a run tolerates without progress between them: a new step of workers that
    continue, or a new checkpoint. One more ends it."""
    after_loss: Literal["auto", "restart", "continue"] = "auto"
    """What follows the loss of a worker. ``continue``: the others repeat the step in progress, at
    once if ``workers`` allows their number, else with a replacement. ``restart``: all workers start
    again from the last checkpoint. ``auto``: ``continue`` with Gloo, ``restart`` with NCCL, where
    ``continue`` has never been run."""
    spares: NonNegativeInt = 0
    """Workers beyond ``workers`` that are started where there is room, and wait with everything
    loaded to take the place of a lost one. Not with ``after_loss`` ``restart``."""
    wait_for_workers_s: NonNegativeFloat = 600.0
    """Seconds to wait for hosts to come back or, with an autoscaler, to be added."""

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]
