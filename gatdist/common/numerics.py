"""How torch computes, within a context."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads in this context. Other numbers round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow, or forbid, TF32 in float32 convolutions and matrix products on CUDA in this context.

    TF32 rounds inputs to 10 bits. torch's default allows it in convolutions only.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextmanager
def kernels(*, deterministic: bool, compiled: bool = False) -> Iterator[None]:
    """Choose, in this context, deterministic kernels or the fastest ones.

    Args:
        deterministic: An operator without a deterministic kernel raises RuntimeError
            (:func:`nondeterministic_operator`). cuBLAS also needs
            :func:`gatdist.config.cuda_variables`. Otherwise, cuDNN measures its algorithms for
            each new shape of a convolution, which pays where shapes are fixed, as in training.
            Deterministic kernels that are switched on already stay on.
        compiled: Whether networks are compiled. If deterministic, their kernels are not tuned by
            measurements then.
    """
    cudnn: Any = torch.backends.cudnn
    utils: Any = torch.utils.deterministic
    mode = torch.get_deterministic_debug_mode()
    before = cudnn.deterministic, cudnn.benchmark, utils.fill_uninitialized_memory
    if deterministic:
        _require_deterministic(2, compiled)
        cudnn.deterministic, cudnn.benchmark = True, False
        # A kernel for each allocation, which only reading uninitialized memory would need.
        utils.fill_uninitialized_memory = False
    elif not (mode or cudnn.deterministic):
        cudnn.benchmark = True
    try:
        yield
    finally:
        if deterministic:
            _require_deterministic(mode, compiled)
        cudnn.deterministic, cudnn.benchmark, utils.fill_uninitialized_memory = before


def _require_deterministic(mode: int, compiled: bool) -> None:
    """Set torch's mode: 0 for any operator, 1 for a warning, 2 for an error."""
    if compiled:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:  # which does not import the compiler, as the other one does in 1 s
        torch.set_deterministic_debug_mode(mode)


_NONDETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


def nondeterministic_operator(error: BaseException) -> str | None:
    """Return the operator without a deterministic kernel, if that is what ``error`` is about."""
    for cause in (error, error.__cause__):
        found = _NONDETERMINISTIC.match(str(cause)) if isinstance(cause, RuntimeError) else None
        if found:
            return found[1]
    return None


_Function = TypeVar("_Function", bound=Callable[..., Any])


def cached_tensors(make: _Function) -> _Function:
    """Cache the constant tensors that a function returns for equal arguments.

    Copying them to a device again would make the host wait, and CUDA graphs keep their addresses.
    Fake tensors are not returned outside of the mode that makes them.
    """

    @cache
    def cached(fake: bool, *args: Any) -> Any:
        with torch.inference_mode(False):  # they may be part of a graph later
            return make(*args)

    @wraps(make)
    def call(*args: Any) -> Any:
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return cached(mode is not None, *args)

    return cast(_Function, call)
