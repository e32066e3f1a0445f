"""What driver and workers tell each other: events one way, a request to stop the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import ray

_POLL_S = 0.3

Event = tuple[str, dict[str, Any]]


class Mailbox:
    """The state between driver and workers; an actor. Only JSON values pass."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False
        self._outcome: dict[str, Any] | None = None
        self._failure: tuple[str, str] | None = None

    def put(self, kind: str, fields: dict[str, Any]) -> None:
        """An event for people."""
        self._events.append((kind, fields))

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        """Ask all workers to checkpoint and end."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether anybody asked."""
        return self._stop

    def finish(self, outcome: dict[str, Any]) -> None:
        """What the training loop returned."""
        self._outcome = outcome

    def outcome(self) -> dict[str, Any] | None:
        """What the training loop returned; None if it has not."""
        return self._outcome

    def fail(self, kind: str, message: str) -> None:
        """An error of gatdist's own; the first one is kept, since it causes the others."""
        self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """Class name and message of the first failure."""
        return self._failure


class Bridge:
    """A handle to a :class:`Mailbox`; may be sent to workers.

    Args:
        actor: the mailbox's handle; None starts one beside the driver.
    """

    def __init__(self, actor: Any = None) -> None:
        self.actor: Any = actor or ray.remote(num_cpus=0)(cast(Any, Mailbox)).remote()

    def emit(self, kind: str, fields: dict[str, Any]) -> None:
        """Send an event, without waiting for its arrival."""
        self.actor.put.remote(kind, fields)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the mailbox and wait for its answer."""
        return ray.get(getattr(self.actor, method).remote(*arguments))

    @contextmanager
    def stop_flag(self) -> Iterator[threading.Event]:
        """An event, cheap to ask, that is set soon after the driver has asked to stop."""
        requested, ended = threading.Event(), threading.Event()

        def poll() -> None:
            while not ended.wait(_POLL_S):
                try:
                    if self.call("stop_requested"):
                        requested.set()
                        return
                except ray.exceptions.RayError:  # the driver is gone, and Ray ends this worker
                    return

        thread = threading.Thread(target=poll, name="stop-flag", daemon=True)
        thread.start()
        try:
            yield requested
        finally:
            ended.set()
            thread.join()
