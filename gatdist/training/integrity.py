"""Check that a training state is finite, complete, and identical on all workers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gatdist.common.errors import PluginError, TrainingError, WorkerLostError
from gatdist.parallel.communicator import Communicator
from gatdist.training.state import TrainState

# An odd multiplier is invertible modulo 2⁶⁴, so that every single changed word is detected.
_MULTIPLIER = 6364136223846793005


class Intact:
    """Compare a state with what it was before training: user code may break it."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        tensors = state.tensors()
        self._kinds = _kinds(tensors)
        # Masks of a user's network may be infinite, and are so from the beginning.
        self._finite = [name for name, is_finite in _finite(tensors).items() if is_finite]

    @torch.no_grad()
    def require(self) -> None:
        """Refuse a state whose checkpoint could not be resumed.

        Raises:
            PluginError: tensors were added, removed or replaced.
            TrainingError: a tensor is no longer finite.
        """
        for owner, player in self._state.players.items():
            now = {n: p for n, p in player.bare.named_parameters() if p.requires_grad}
            for key in sorted(now.keys() | player.parameters.keys()):
                if now.get(key) is not player.parameters.get(key):
                    self._refuse(f"model.{owner}: parameter {key}", "frozen or replaced by another")
        tensors = self._state.tensors()
        kinds = _kinds(tensors)
        for name in sorted(kinds.keys() | self._kinds.keys()):
            if kinds.get(name) != self._kinds.get(name):
                self._refuse(f"tensor {name}", "replaced by another shape or dtype")
        finite = _finite(tensors)
        for name in self._finite:
            if not finite[name]:
                raise TrainingError(
                    f"tensor {name} is no longer finite after {self._state.samples_seen:,} "
                    "samples. The last checkpoint is good"
                )

    def _refuse(self, subject: str, how: str) -> None:
        raise PluginError(
            subject,
            f"was added, removed, {how} during the run; its checkpoints could not be resumed",
            hint="Create parameters and buffers in the constructor, and then change values only",
        )


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _finite(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Return whether each tensor is finite, by one transfer from the device."""
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
    return dict(zip(tensors, finite.tolist(), strict=True))


@torch.no_grad()
def require_equal_replicas(tensors: Mapping[str, Tensor], comm: Communicator) -> None:
    """Compare checksums of all tensors (the same names on every worker) with worker 0's.

    Raises:
        WorkerLostError: a tensor differs; the first is named, and a worker that holds it.
    """
    if comm.world_size == 1:
        return
    names = sorted(tensors)
    mine = torch.stack([_checksum(tensors[name]).to(comm.device) for name in names])
    different = (mine != comm.broadcast_(mine.clone())).nonzero().flatten()
    first = different[:1] if len(different) else different.new_full((1,), len(names))
    firsts = comm.all_gather(first).flatten().cpu()
    column, rank = map(int, firsts.min(dim=0))
    if column < len(names):
        raise WorkerLostError(
            f"worker {rank} holds another {names[column]} than worker 0, though they compute "
            "alike. A device, memory or network fault is likely: run gatdist doctor on its host. "
            "The last checkpoint is good"
        )


def _checksum(tensor: Tensor) -> Tensor:
    """Return an int64 that changes with any byte and with their order: Σ (wᵢ + 1) (2i + 1) M."""
    word = torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8
    words = tensor.detach().contiguous().view(-1).view(word)
    # Of parts, since intermediate results are larger than the tensor: in a CPU's cache.
    size = 2**16 if tensor.device.type == "cpu" else 2**24
    places = torch.arange(min(len(words), size), device=words.device).mul_(2).add_(1)
    places *= _MULTIPLIER
    first = torch.tensor(_MULTIPLIER, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, part in enumerate(words.split(size)):
        found = part.to(torch.int64) + 1
        total += (found * places[: len(found)]).sum() + found.sum() * (first * (2 * number * size))
    return total
