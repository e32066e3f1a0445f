"""Layers that couple the samples of a batch, and what they forbid."""

from __future__ import annotations

from torch import nn

from gatdist.config import BOTH, Config
from gatdist.errors import ConfigError
from gatdist.parallel.communicator import bare


def coupling_layer(network: nn.Module) -> str | None:
    """The first layer whose output for one sample depends on the others, for messages; or None.

    Batch normalization is known; a module of one's own says so by ``couples_samples = True``.
    """
    for name, module in bare(network).named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(
            module, "couples_samples", False
        ):
            return f"{name!r} ({type(module).__name__})"
    return None


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
    layer = coupling_layer(network)
    if layer is None:
        return
    if config.run.reduction == "canonical":
        what, mend = "the lanes of run.reduction = 'canonical'", "Use run.reduction = 'fast'"
    elif any(getattr(config.optim, name).micro_batch for name in BOTH):
        what, mend = "micro-batches", "Leave out optim.*.micro_batch"
    elif workers > 1 and next(network.parameters()).device.type != "cuda":
        what, mend = f"{workers} workers on the CPU", "Use --workers 1"
    else:
        return
    raise ConfigError(
        f"model.{player}.name",
        f"its layer {layer} couples the samples of a batch, which {what} would cut",
        mend=f"{mend}, or a network without such layers",
    )
