"""Layers that couple the samples of a batch, and what they forbid."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from gatdist.common.errors import ConfigError
from gatdist.config import BOTH, Config
from gatdist.parallel.communicator import bare


def coupling_layer(network: nn.Module) -> str | None:
    """The first layer whose output for one sample depends on the others, for messages; or None.

    Batch normalization is known; a module of one's own says so by ``couples_samples = True``.
    """
    return next((message for message, _ in _coupling_layers(network)), None)


def _coupling_layers(network: nn.Module) -> Iterator[tuple[str, bool]]:
    """Each such layer, for messages, and whether workers can compute it together, on GPUs."""
    for name, module in bare(network).named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm or getattr(module, "couples_samples", False):
            yield f"{name!r} ({type(module).__name__})", is_norm


def require_whole_batches(config: Config, player: str, network: nn.Module, workers: int) -> None:
    """Refuse to cut a batch that a layer of ``network`` would have to see whole.

    Args:
        config: of the run.
        player: whose network it is.
        network: on the device where it will be used.
        workers: number of workers.

    Raises:
        ConfigError: the batch goes through the network in parts.
    """
    layers = dict(_coupling_layers(network))
    if not layers:
        return
    layer = next(iter(layers))
    alone = next((message for message, is_norm in layers.items() if not is_norm), None)
    if config.run.reduction == "canonical":
        what, hint = "the lanes of run.reduction = 'canonical'", "Use run.reduction = 'fast'"
    elif any(getattr(config.optim, name).micro_batch for name in BOTH):
        what, hint = "micro-batches", "Leave out optim.*.micro_batch"
    elif workers > 1 and next(network.parameters()).device.type != "cuda":
        what, hint = f"{workers} workers on the CPU", "Use --workers 1"
    elif workers > 1 and config.precision.cuda_graphs:
        what, hint = f"{workers} workers with recorded steps", "Leave out precision.cuda_graphs"
    elif workers > 1 and alone:
        layer, what, hint = alone, f"{workers} workers", "Use --workers 1"
    else:
        return
    raise ConfigError(
        f"model.{player}.name",
        f"its layer {layer} couples the samples of a batch, which {what} would cut",
        hint=f"{hint}, or a network without such layers",
    )
