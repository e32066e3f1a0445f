"""Buffers of networks, and the running statistics of batch normalization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norms(network: nn.Module) -> list[BatchNorm]:
    """Return the batch normalizations that have running statistics."""
    return [
        module
        for module in network.modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    ]


def running_statistics(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance, [c] each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers at the end."""
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    try:
        yield
    finally:
        for name, tensor in network.named_buffers():
            if name in before:
                tensor.copy_(before[name])


class Statistics:
    """Means and unbiased variances [c] of the inputs of some batch normalizations."""

    def __init__(self, norms: Sequence[BatchNorm]) -> None:
        self._before = [running_statistics(norm) for norm in norms]
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in norms]

    def add(self, number: int, x: Tensor) -> None:
        """Note an input [n, c, …] of norm ``number``."""
        var, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1])
        self._seen[number].append((mean, var))

    def take(self) -> list[Tensor]:
        """Return mean and variance of each norm, averaged over its inputs, and forget them.

        Those of a norm that had no input are its running statistics.
        """
        found = []
        for seen, before in zip(self._seen, self._before, strict=True):
            means, variances = zip(*(seen or [before]), strict=True)
            found += [torch.stack(means).mean(0), torch.stack(variances).mean(0)]
            seen.clear()
        return found


@contextmanager
def batch_statistics(norms: Sequence[BatchNorm]) -> Iterator[Statistics]:
    """Normalize by each batch's own statistics, in evaluation mode too; yield those."""
    statistics = Statistics(norms)
    kept = [running_statistics(norm) for norm in norms]
    with ExitStack() as stack:
        for number, norm in enumerate(norms):
            hook = partial(_note, statistics, number)
            stack.callback(norm.register_forward_pre_hook(hook).remove)
            norm.running_mean = norm.running_var = None  # torch then uses the batch's
        try:
            yield statistics
        finally:
            for norm, (mean, var) in zip(norms, kept, strict=True):
                norm.running_mean, norm.running_var = mean, var


def _note(
    statistics: Statistics, number: int, module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    statistics.add(number, inputs[0])
