"""Checks of a network before its first forward: parameters, buffers and ``state_dict``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gatdist.common.errors import PluginError
from gatdist.config import PlayerName

# Noise values per sample. StyleGAN2 has 2^21 at 1024 x 1024 pixels.
_MOST_NOISE = 2**26

# (rule, hint) → raises.
Refuse = Callable[..., NoReturn]


def require_trainable(player: PlayerName, name: str, network: object) -> None:
    """Raise PluginError unless optimizers, checkpoints and workers can handle the network."""

    def refuse(rule: str, hint: str = "") -> NoReturn:
        raise PluginError(f"model.{player}.name", rule, value=name, hint=hint)

    if not isinstance(network, nn.Module):
        kind = network.__name__ if isinstance(network, type) else type(network).__name__
        refuse(f"must build a torch.nn.Module; found {kind}")
    for key, module in network.named_modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            kind, place = type(module).__name__, f"its module {key!r}" if key else "it"
            refuse(f"{place} is a {kind}; gatdist distributes networks itself", "Remove it")
    size = getattr(network, "noise_size", 0)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MOST_NOISE:
        refuse(f"noise_size must be an integer from 0 to {_MOST_NOISE:,}; found {size!r}")
    for key, module in network.named_modules():
        group = getattr(module, "couples_samples", False)
        if not isinstance(group, (bool, int)) or group < 0:
            place = f"{key}.couples_samples".lstrip(".")
            refuse(f"{place} must be a bool, or the samples per group; found {group!r}")
    for key, tensor in _tensors(network):
        if is_lazy(tensor):
            hint = "Give the module its input size, from sample_shape"
            refuse(f"{key!r} has no shape yet (a lazy module)", hint)
        if tensor.layout != torch.strided:
            refuse(f"the tensor {key!r} is {tensor.layout}; expected a dense tensor")
    for key, parameter in network.named_parameters():
        _require_parameter(key, parameter, refuse)
    if not any(p.requires_grad for p in network.parameters()):
        refuse("has no trainable parameters (none, or requires_grad is False for all)")
    _require_state(network, refuse)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def _require_parameter(key: str, parameter: Tensor, refuse: Refuse) -> None:
    kind = dtype_name(parameter.dtype)
    if not parameter.is_floating_point():
        refuse(
            f"the parameter {key!r} is {kind}; expected floating-point numbers",
            "Use torch.view_as_real for complex numbers, a buffer for integers",
        )
    if parameter.is_meta and torch.get_default_device().type != "meta":
        refuse(f"the parameter {key!r} is on the device 'meta', without values")
    if any(n > 1 and s == 0 for n, s in zip(parameter.shape, parameter.stride(), strict=True)):
        refuse(f"entries of the parameter {key!r} overlap in memory", "Use contiguous()")


def _require_state(network: nn.Module, refuse: Refuse) -> None:
    """Refuse a ``state_dict`` of anything but the parameters and persistent buffers themselves."""
    try:
        state = network.state_dict()
        entries = dict(state.items())
    except Exception as error:
        refuse(f"its state_dict() fails ({type(error).__name__}: {error})")
    own: dict[str, Tensor] = {}
    for prefix, module in network.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    own[f"{prefix}.{key}".lstrip(".")] = tensor
    hint = "Do not override state_dict() or get_extra_state(); keep state in buffers"
    for key, value in entries.items():
        mine = own.get(key)
        if not isinstance(value, Tensor):
            refuse(f"state_dict()[{key!r}] must be a tensor; found {type(value).__name__}", hint)
        if mine is None:
            refuse(f"state_dict() has {key!r}, which is no parameter or persistent buffer", hint)
        if value.data_ptr() != mine.data_ptr() or value.shape != mine.shape:
            refuse(f"state_dict()[{key!r}] must be the network's tensor itself, not a copy", hint)
    missing = sorted(own.keys() - entries.keys())
    if missing:
        refuse(f"state_dict() lacks {missing[0]!r}; checkpoints would lose it", hint)


def require_apart(generator: nn.Module, discriminator: nn.Module) -> None:
    """Raise PluginError if the networks share memory: a parameter or buffer, or a view of one."""
    theirs = [(name, _memory(tensor)) for name, tensor in _tensors(generator)]
    for key, tensor in _tensors(discriminator):
        first, last = _memory(tensor)
        for name, (start, end) in theirs:
            if first < end and start < last:
                raise PluginError(
                    "model.discriminator.name",
                    f"the tensor {key!r} shares memory with the generator's {name!r}; each "
                    "network must have its own",
                    hint="Copy it: tensor.detach().clone()",
                )


def _tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's address range: the first byte, and the one after the last."""
    if not tensor.numel():
        return 0, 0
    if tensor.is_meta:  # has no address
        return -id(tensor) - 1, -id(tensor)
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()
