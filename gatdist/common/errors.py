"""What can go wrong, and the exit status of each.

::

    GatdistError                   1   anything else
    ├── UserError                  2   the user can fix it
    │   ├── ConfigError                a key of the configuration
    │   ├── DataError                  shards, indexes, samples
    │   ├── StorageError               a URL: missing, not permitted, not writable
    │   ├── CheckpointError            a run directory or a checkpoint in it
    │   ├── ClusterError               Ray, workers, hosts
    │   └── PluginError                a user's own module or network
    ├── RetryableError              75  trying again may help
    │   ├── StorageUnavailableError    storage down or throttling past the retry budget
    │   ├── InterruptedRunError        Ctrl-C, SIGTERM or a preemption notice
    │   └── WorkerLostError            a worker or host died, hangs, or computes something else
    └── TrainingError              1   the run itself went wrong (non-finite past the budget)
        └── StaleAttemptError          another start of the same run has taken it over

A :class:`UserError` is told in one line: subject (field or file), value, rule, hint.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_ABSENT = object()
# What files say of themselves may be a megabyte long; a message is for a terminal.
_MOST_CHARACTERS, _LONGEST_PART = 500, 4000


class GatdistError(Exception):
    """Root of all errors that gatdist raises on purpose."""

    exit_status = 1


class Interruption(BaseException):
    """Raised in the main thread by a signal. No Exception: users' code catches those."""


class UserError(GatdistError):
    """Something the user can fix, reported in one message.

    Args:
        subject: the field, file or URL at fault, for example ``run.global_batch``.
        rule: what must hold, for example ``must be divisible by the 3 workers``.
        value: the offending value; left out of the message when not given.
        hint: what to do about it, as an imperative sentence without a full stop.

    Attributes:
        subject: as given; "" if another process has raised the error.
        value: as given; None without one.
    """

    exit_status = 2
    subject: str = ""
    value: object = None

    def __init__(self, subject: str, rule: str, *, value: object = _ABSENT, hint: str = "") -> None:
        self.subject = subject
        if value is not _ABSENT:
            self.value = value
        shown = "" if value is _ABSENT else f" = {_cut(repr(value), _MOST_CHARACTERS)}"
        message = f"{_cut(subject, _LONGEST_PART)}{shown}: {_cut(rule, _LONGEST_PART)}"
        super().__init__(message + (f". {_cut(hint, _LONGEST_PART)}." if hint else ""))


class ConfigError(UserError):
    """A key of the configuration is unknown, mistyped, out of range or at odds with another."""


class DataError(UserError):
    """A data set, shard, index or sample is missing, damaged or of the wrong kind."""


class StorageError(UserError):
    """A URL can't be used: missing, not permitted, not writable, unknown protocol."""


class CheckpointError(UserError):
    """A run directory or checkpoint can't be used."""


class ClusterError(UserError):
    """The cluster can't run what was asked."""


class PluginError(UserError):
    """A user's own module does not import, does not fit, or fails during a run."""


class RetryableError(GatdistError):
    """Trying the same command again may help."""

    exit_status = 75


class StorageUnavailableError(RetryableError):
    """Storage did not answer, or kept failing, past the retry budget."""


class InterruptedRunError(RetryableError):
    """The run was asked to stop; its state is safe and the same command resumes it."""


class WorkerLostError(RetryableError):
    """A worker or its host died or went wrong; the run can go on from its last checkpoint."""


class TrainingError(GatdistError):
    """Training itself went wrong."""


class StaleAttemptError(TrainingError):
    """Another start of the same run has taken it over; this one must write nothing more."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``Did you mean 'fid'?`` or ``Known: fid, kid`` for an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (
        f"Did you mean {close[0]!r}? Known: {', '.join(known)}"
        if close
        else f"Known: {', '.join(known)}"
    )


def rebuilt(kind: str, message: str) -> GatdistError:
    """An error that another process has told by class and message, as the class that it was."""
    found = globals().get(kind, GatdistError)
    error: GatdistError = found.__new__(found)
    error.args = (message,)
    return error


# Known by the names of their classes: commands that need no networks do not import torch.


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another worker is gone. Gloo has no class for that."""
    by_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return "DistError" in _class_names(error) or by_gloo


def is_broken_device(error: BaseException) -> bool:
    """Whether the device itself failed; one that is only too small would fail again."""
    names = _class_names(error)
    of_cuda = isinstance(error, RuntimeError) and "CUDA error" in str(error)
    return "OutOfMemoryError" not in names and ("AcceleratorError" in names or of_cuda)


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


# The line of a traceback, or of its copy within another message, that says what was raised.
_RAISED = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning): \S"
)


def summary(error: BaseException) -> str:
    """What an error says, in one line: of a chain of tracebacks, the first line of the last error.

    Messages of several lines often end with advice or numbers; their first line says what is wrong.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised[-1] if raised else lines[0])[:_MOST_CHARACTERS]


# Control characters but for line ends, tabs and colors: others move the cursor, or worse.
_CONTROLS = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")


def for_terminal(text: str) -> str:
    """A text that may hold what strangers wrote, with control characters escaped; not too long."""
    escaped = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    return "\n".join(_cut(line, _LONGEST_PART) for line in escaped.split("\n"))


def _cut(text: str, most: int) -> str:
    """Both ends of a text that is longer than ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
