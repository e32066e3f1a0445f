"""Weights in the dtype of autocast, cast once for several uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# By weight, dtype and whether a graph is kept: the weight, its version, and its cast.
_Casts = dict[tuple[int, torch.dtype, bool], tuple[Tensor, int, Tensor]]
_casts: ContextVar[_Casts | None] = ContextVar("casts", default=None)


@contextmanager
def shared_casts() -> Iterator[None]:
    """Cast each weight once in this block, however often networks use it.

    Gradients of all uses are added in the narrow dtype and cast once per backward, as within one
    forward under autocast. Autocast's own cache ends with each forward, and does not know
    convolutions of ``gatdist.nn``.
    """
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another dtype, from the enclosing :func:`shared_casts` if it has it."""
    # Only parameters: the derivative of a cast may be taken twice, that of other operators not.
    if weight.dtype == dtype or torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.to(dtype)
    casts = _casts.get()
    if casts is None:
        return weight.to(dtype)
    key = id(weight), dtype, weight.requires_grad and torch.is_grad_enabled()
    known, version, found = casts.get(key, (None, -1, weight))
    if known is not weight or version != weight._version:
        found = weight.to(dtype)
        casts[key] = weight, weight._version, found
    return found
