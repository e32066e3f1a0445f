"""Fingerprints of the plain attributes of modules: what they remember beside their buffers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attributes of every module; ``training`` is set by whoever uses it.
_OWN = frozenset(vars(nn.Module())) | {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEEPEST = 4


def attribute_states(network: nn.Module) -> dict[str, object]:
    """A fingerprint of each attribute that holds plain values, by name."""
    found: dict[str, object] = {}
    for prefix, module in network.named_modules():
        of_class = {} if type(module).__module__.startswith("torch.") else vars(type(module))
        for key, value in {**of_class, **vars(module)}.items():
            if key not in _OWN and not key.startswith("__"):
                state = _state(value)
                if state is not None:
                    found[f"{prefix}.{key}".lstrip(".")] = state
    return found


def object_states(thing: object, leave_out: frozenset[str]) -> dict[str, object]:
    """The same of an object's attributes."""
    states = {k: _state(v) for k, v in vars(thing).items() if k not in leave_out}
    return {key: state for key, state in states.items() if state is not None}


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    """Names whose fingerprints differ."""
    names = before.keys() | after.keys()
    return tuple(sorted(name for name in names if before.get(name) != after.get(name)))


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (
        a.is_floating_point()
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def _state(value: Any, depth: int = 0) -> object:
    """What ``value`` holds, comparable by ``==``; None where it is of another kind."""
    if isinstance(value, Tensor):
        array = value.detach().to("cpu", copy=True).contiguous().reshape(-1)
        return "tensor", str(value.dtype), tuple(value.shape), _bytes(array)
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.Generator):
        return "generator", value.get_state().cpu().numpy().tobytes()
    if isinstance(value, random.Random):
        return "generator", value.getstate()
    if isinstance(value, np.random.Generator):
        return "generator", repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        state: Any = value.get_state(legacy=False)["state"]
        return "generator", state["pos"], state["key"].tobytes()
    if isinstance(value, _PLAIN):
        return "value", repr(value)
    if depth < _DEEPEST:
        return _state_of_many(value, depth + 1)
    return None


def _state_of_many(value: Any, depth: int) -> object:
    if isinstance(value, Mapping):
        return "mapping", [(repr(key), _state(each, depth)) for key, each in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return "sequence", [_state(each, depth) for each in value]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(map(repr, value))
    if isinstance(value, Iterator):
        return "iterator", repr(value)  # of itertools.count and the like
    return None


def _bytes(flat: Tensor) -> bytes:
    if flat.layout != torch.strided or flat.is_quantized or not flat.numel():
        return b""
    return flat.view(torch.uint8).numpy().tobytes()
