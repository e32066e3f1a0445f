"""A CPU stand-in for CUDA graphs, with the same rules.

Like a graph, a tape records operations with their arguments: tensors by address, numbers by value.
Recording computes nothing, and reading or copying numbers from the host raises.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gatdist.parallel.recording import Recorder

aten = torch.ops.aten
# Each makes the host wait for the device, or depends on numbers in a way that can't be recorded.
FORBIDDEN = {
    aten._local_scalar_dense.default: "reads a number",
    aten.equal.default: "reads numbers",
    aten.nonzero.default: "has an output as large as its numbers say",
    aten.masked_select.default: "has an output as large as its numbers say",
    aten.lift_fresh.default: "brings in numbers of the host",
}
COPIES = {aten._to_copy.default, aten.copy_.default}
# These modify arguments, although their schema does not say so.
MORE_CHANGED = {aten.native_batch_norm.default: {"running_mean", "running_var"}}
# These change the shape of a tensor and compute nothing on a device: they need no replay.
SHAPES = {aten.unsqueeze_.default, aten.squeeze_.dim, aten.t_.default, aten.transpose_.default}


class Tape(Recorder):
    """Records operations and replays them."""

    def __init__(self):
        self.pieces = None
        self.recorded = self.replayed = self.warmed_up = 0

    def warm_up(self, function):
        self.warmed_up += 1
        return function()

    def record(self, function):
        self.recorded += 1
        pieces = self.pieces = []
        saved: dict[int, tuple[Tensor, Tensor]] = {}
        with _Mode(pieces, saved):
            value = function()
        self.pieces = None
        with torch.no_grad():  # a graph computes nothing while it is recorded
            for tensor, before in saved.values():
                tensor.copy_(before)

        def replay():
            self.replayed += 1
            with torch.no_grad():
                for piece in pieces:
                    piece()

        return value, replay

    def outside(self, function):
        if self.pieces is None:
            function()
        else:
            self.pieces.append(function)


@contextmanager
def no_host_values():
    """Raise on tensors made from Python numbers and on copies from the host to a device."""
    with _NoCopies(), _NoLiterals():
        yield


class _NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in COPIES and len(_devices((args, out))) > 1:
            raise RuntimeError(f"{func} brings in numbers of the host")
        return out


class _NoLiterals(TorchFunctionMode):
    """Intercepts ``torch.tensor``, which a dispatch mode does not see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            raise RuntimeError(f"{func.__name__} brings in numbers of the host")
        return func(*args, **(kwargs or {}))


def _devices(args):
    return {t.device.type for t in tree_leaves(args) if isinstance(t, Tensor)}


class _Mode(TorchDispatchMode):
    def __init__(self, pieces, saved):
        super().__init__()
        self.pieces, self.saved, self.made = pieces, saved, []
        self._own = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FORBIDDEN:
            raise RuntimeError(f"{func} {FORBIDDEN[func]}")
        self._save_mutated(func, args, kwargs)
        args, kwargs = tree_map(lambda x: x, (args, kwargs))  # lists may be changed later
        out = func(*args, **kwargs)
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [i for i, t in enumerate(outs) if _storage(t) not in known]
        self._own |= {_storage(outs[i]) for i in fresh}
        self.made.append(outs)  # kept alive, so that no address is reused

        if func in SHAPES:
            return out

        def replay_all():
            new = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for i in fresh:
                outs[i].copy_(new[i].reshape(outs[i].shape))

        self.pieces.append(replay_all)
        return out

    def _save_mutated(self, func, args, kwargs):
        for i, argument in enumerate(func._schema.arguments):
            message = argument.alias_info is not None and argument.alias_info.is_write
            if not message and argument.name not in MORE_CHANGED.get(func, ()):
                continue
            value = kwargs.get(argument.name) if argument.name in kwargs else None
            if value is None and i < len(args):
                value = args[i]
            for tensor in (t for t in tree_leaves(value) if isinstance(t, Tensor)):
                where = _storage(tensor)
                if where not in self._own and where not in self.saved:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.saved[where] = (whole, whole.clone())


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()
