"""What the derivatives of several layers have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Types of devices where torch's own operators and derivatives are as fast.
_plain = {"cpu", "meta"}


@contextmanager
def derivatives_of_gpus() -> Iterator[None]:
    """Compute on every device with the operators and derivatives of GPUs, in this block."""
    global _plain
    before, _plain = _plain, set()
    try:
        yield
    finally:
        _plain = before


def has_derivatives_of_gpus(x: Tensor) -> bool:
    """Return whether operators on ``x`` are those for GPUs."""
    return x.device.type not in _plain


def is_plain(x: Tensor) -> bool:
    """Return whether to use torch's own derivatives, on CPUs and for compilers and torch.func."""
    return (
        not has_derivatives_of_gpus(x)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def needs_gradient(ctx: Any, index: int, missing: int = 0) -> bool:
    """Return whether the backward that runs now asks for the gradient of a tensor argument.

    ``ctx.needs_input_grad`` is the same in all backwards: true for weights, even if only the
    gradient by the samples is asked for. ``index`` counts from the first argument; those up to it
    are tensors, except for ``missing`` ones, which are None.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node, _ = ctx.next_functions[index - missing]
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch refuses to say it of leaves that torch.autograd.grad is given
        return True
