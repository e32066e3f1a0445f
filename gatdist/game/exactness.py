"""Settings that hidden state or layers that couple samples rule out, and what is not guaranteed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import BOTH, Config, PlayerName
from gatdist.game.hidden import Traits
from gatdist.models.buffers import BatchNorm
from gatdist.parallel.communicator import bare
from gatdist.parallel.reduction import micro_batches


def require_exact(config: Config, traits: Mapping[PlayerName, Traits]) -> list[str]:
    """Refuse hidden state that a setting rules out; return warnings about the rest.

    Raises:
        ConfigError: A setting rules out what a network does.
        PluginError: ``run.reduction = "canonical"`` cannot be guaranteed.
    """
    warnings: list[str] = []
    for player, found in traits.items():
        name = getattr(config.model, player).name
        field = f"model.{player}.name"
        warnings += found.warnings
        state = [f"the attribute {each!r}" for each in found.attributes]
        if found.is_erratic and not state:
            state = ["state that gatdist cannot see (a generator, a global variable, the time)"]
        if state:
            hint = "Keep state in buffers, and draw from torch's default generator"
            warnings.append(warn_of_state(config, field, name, f"forward changes {state[0]}", hint))
        if found.generators and config.run.reduction == "fast":
            warnings.append(
                f"{field} = {name!r}: draws from {' and '.join(found.generators)}, seeded by "
                "run.seed and samples_seen. Draws differ for another number of workers or "
                "micro-batch. Use the attribute noise_size or run.reduction = 'canonical' to "
                "avoid that"
            )
        if found.buffers and config.run.reduction == "fast":
            more = f" and {len(found.buffers) - 1} more" if len(found.buffers) > 1 else ""
            warnings.append(
                f"{field} = {name!r}: forward changes the buffer {found.buffers[0]!r}{more}. "
                "After each phase it is set to the mean over forwards and workers, which depends "
                "on how the batch is divided"
            )
        _require_recordable(config, player, found)
    return warnings


def warn_of_state(config: Config, field: str, name: str, change: str, hint: str) -> str:
    """Return a warning of state outside checkpoints, or refuse it if the run is canonical."""
    rule = f"{change}, which is neither in checkpoints nor shared by the workers"
    if config.run.reduction == "canonical":
        raise PluginError(
            field, f"{rule}, as run.reduction = 'canonical' requires", value=name, hint=hint
        )
    return (
        f"{field} = {name!r}: {rule}. A resumed run, or a run on another number of workers, may "
        f"differ. {hint}"
    )


def _require_recordable(config: Config, player: PlayerName, found: Traits) -> None:
    state = [*found.generators, *found.attributes]
    if config.precision.cuda_graphs and state:
        raise ConfigError(
            "precision.cuda_graphs",
            f"the {player}'s forward draws from or changes {state[0]}, which a CUDA graph would "
            "not repeat",
            value=True,
            hint="Leave it out",
        )
    if player in config.precision.compile and found.buffers:
        raise ConfigError(
            "precision.compile",
            f"the {player}'s forward changes the buffer {found.buffers[0]!r}",
            value=player,
            hint="Leave this network out",
        )


@dataclass(frozen=True)
class Coupling:
    """A layer that couples samples of a batch.

    Attributes:
        layer: Its name and class.
        group: Samples per group, where it couples samples i and j of n only if i ≡ j modulo
            n / group; None: it couples the whole batch.
        is_norm: Whether it is batch normalization, which workers with GPUs compute together.
    """

    layer: str
    group: int | None
    is_norm: bool


def couplings(network: nn.Module) -> list[Coupling]:
    """Return the layers that couple samples: batch normalization, and what declares it.

    A module declares it by the attribute ``couples_samples``: True, or the samples per group.
    """
    found = []
    for name, module in bare(network).named_modules():
        is_norm = isinstance(module, BatchNorm)
        declared = is_norm or getattr(module, "couples_samples", False)
        if declared:
            group = None if declared is True else int(declared)
            found.append(Coupling(f"{name!r} ({type(module).__name__})", group, is_norm))
    return found


def coupling_layer(network: nn.Module) -> str | None:
    """Describe the first layer that couples samples; None if there is none."""
    return next((found.layer for found in couplings(network)), None)


def require_whole_batches(config: Config, player: str, network: nn.Module, workers: int) -> None:
    """Refuse to divide the batch if a layer of ``network``, on its device, couples all of it."""
    layers = [found for found in couplings(network) if found.group is None]
    if not layers:
        return
    layer = layers[0].layer
    unsynchronized = [found.layer for found in layers if not found.is_norm]
    if config.run.reduction == "canonical":
        what, hint = "run.reduction = 'canonical'", "Use run.reduction = 'fast'"
    elif any(getattr(config.optim, name).micro_batch for name in BOTH):
        what, hint = "optim.*.micro_batch", "Leave out optim.*.micro_batch"
    elif workers > 1 and next(network.parameters()).device.type != "cuda":
        what, hint = f"training on {workers} workers on the CPU", "Use --workers 1"
    elif workers > 1 and config.precision.cuda_graphs:
        what, hint = f"precision.cuda_graphs on {workers} workers", "Leave it out"
    elif workers > 1 and unsynchronized:
        layer, what, hint = unsynchronized[0], f"training on {workers} workers", "Use --workers 1"
    else:
        return
    raise ConfigError(
        f"model.{player}.name",
        f"the layer {layer} couples the samples of a batch, which {what} divides",
        hint=f"{hint}, or a network without such layers",
    )


def require_whole_groups(
    config: Config, player: str, network: nn.Module, sizes: Sequence[int]
) -> Sequence[int]:
    """Return the numbers of workers that keep whole the groups that a layer of ``network`` couples.

    Parts hold every k-th sample of the global batch, and groups every (batch / group)-th. So groups
    are the same for all numbers of workers (``sizes``), virtual workers and micro-batches with
    whole groups.

    Raises:
        ConfigError: no number of workers does, or micro-batches cut groups.
    """
    fitting = sizes
    for found in couplings(network):
        if found.group is not None:
            what = f"the {player}'s layer {found.layer} couples samples in groups of {found.group}"
            for key, batch in (
                ("run.global_batch", config.run.global_batch),
                ("game.generator_batch", config.generator_batch),
            ):
                if batch % found.group:
                    hint = f"Use {max(found.group, batch // found.group * found.group)}"
                    rule = f"{what}, which must divide it"
                    raise ConfigError(key, rule, value=batch, hint=hint)
                fitting = _with_whole_groups(config, batch, found.group, what, fitting)
    return fitting


def _with_whole_groups(
    config: Config, batch: int, group: int, what: str, sizes: Sequence[int]
) -> Sequence[int]:
    groups = batch // group
    rule = f"must divide the {groups} groups of a batch: {what}"
    if config.run.reduction == "canonical":
        parts = config.run.virtual_workers
        if groups % parts:
            hint = f"Use {math.gcd(parts, groups)}"  # a divisor of a power of two is one
            raise ConfigError("run.virtual_workers", rule, value=parts, hint=hint)
        return sizes
    fitting = [size for size in sizes if groups % size == 0]
    if not fitting:
        nearest = next(n for n in range(sizes[-1], 0, -1) if groups % n == 0)
        hint = f"Use --workers {nearest}, or a larger batch"
        raise ConfigError("cluster.workers", rule, value=sizes[-1], hint=hint)
    for share in (batch // size for size in fitting):
        for name in BOTH:
            micro_batch = getattr(config.optim, name).micro_batch
            parts = micro_batches(share, micro_batch)
            if share // group % parts:
                choices = [n for n in range(group, micro_batch, group) if share % n == 0]
                hint = f"Use {max(choices, default=group)}"
                cut = f"{what}, which {parts} micro-batches of {share} samples cut"
                raise ConfigError(f"optim.{name}.micro_batch", cut, value=micro_batch, hint=hint)
    return fitting
