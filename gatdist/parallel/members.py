"""Workers that may change during a run: each epoch has its own group, in the same processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.parallel.communicator import Communicator, LocalCommunicator, Replica


class Membership(ABC):
    """Connects a worker with those of the next epoch.

    Attributes:
        cause: why the present epoch has begun, for the user; "" if that is unknown.
        joins: whether this worker was no member of the epoch before, so that the others may have
            made steps without it.
    """

    cause = ""
    joins = False

    @abstractmethod
    def next(self) -> Communicator:
        """Leave the present epoch, wait for the next one, and return the communicator of its group.

        Workers that stay keep the order of their ranks, and one of them is rank 0.

        Raises:
            RetryableError: there is no next epoch, or this worker is not part of it.
        """

    @abstractmethod
    def is_due(self) -> bool:
        """Return whether the workers are to change at the end of a step."""


class Members(Communicator):
    """The workers of the present epoch; :meth:`change` moves to the next one.

    All that holds this object sees the new workers, and networks get new wrappers. Collectives
    that fail leave tensors undefined.

    Args:
        present: communicator of the workers that start together; None for a worker that joins a
            run: until it does, it is alone.
        membership: of this worker.
        device: of this worker.

    Attributes:
        is_joining: whether this worker does not yet take part, or not any more: it lacks the state.
    """

    def __init__(
        self, present: Communicator | None, membership: Membership, device: torch.device
    ) -> None:
        self.is_joining = present is None
        self._membership = membership
        self._replicas: list[tuple[Replica, bool]] = []
        self._use(present or LocalCommunicator(device))

    def change(self) -> str:
        """Continue to the next epoch; see :meth:`Membership.next`. Return its cause."""
        self._use(self._membership.next())
        self.is_joining = self.is_joining or self._membership.joins
        return self._membership.cause

    def is_due(self) -> bool:
        """Return whether a change is to be made at the end of a step, as far as is known here."""
        return self._membership.is_due()

    def _use(self, inner: Communicator) -> None:
        super().__init__(inner.rank, inner.world_size, inner.device)
        self._inner = inner
        for replica, compress in self._replicas:
            replica.use(inner.wrapped(replica.module, compress=compress))

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return self._inner.all_reduce_(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._inner.all_gather(tensor)

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        return self._inner.broadcast_(tensor, source)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return self._inner.broadcast_object(value, source)

    def all_to_all(self, rows: Tensor) -> Tensor:
        return self._inner.all_to_all(rows)

    def wrapped(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        replica = Replica(module, self._inner.wrapped(module, compress=compress))
        self._replicas.append((replica, compress))
        return replica

    def take_communication_s(self) -> float:
        return self._inner.take_communication_s()
