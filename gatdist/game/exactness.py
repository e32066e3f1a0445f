"""Settings that hidden state or layers that couple samples rule out, and what is not guaranteed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import BOTH, Config, PlayerName
from gatdist.game.hidden import Traits
from gatdist.models.buffers import BatchNorm
from gatdist.parallel.communicator import bare


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


def coupling_layer(network: nn.Module) -> str | None:
    """Describe the first layer that couples the samples of a batch; None if there is none.

    Such layers are batch normalization and modules with the attribute ``couples_samples = True``.
    """
    return next(iter(_coupling_layers(network)), None)


def _coupling_layers(network: nn.Module) -> dict[str, bool]:
    """By description: whether workers with GPUs can compute the layer together."""
    found = {}
    for name, module in bare(network).named_modules():
        is_norm = isinstance(module, BatchNorm)
        if is_norm or getattr(module, "couples_samples", False):
            found[f"{name!r} ({type(module).__name__})"] = is_norm
    return found


def require_whole_batches(config: Config, player: str, network: nn.Module, workers: int) -> None:
    """Refuse to divide the batch if a layer of ``network``, on its device, couples its samples."""
    layers = _coupling_layers(network)
    if not layers:
        return
    layer = next(iter(layers))
    unsynchronized = [name for name, is_norm in layers.items() if not is_norm]
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
