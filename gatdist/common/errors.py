"""Exceptions of gatdist, and the exit statuses of the commands that raise them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_ABSENT = object()
# What files say of themselves may be a megabyte long; a message is for a terminal.
_MOST_CHARACTERS, _LONGEST_PART = 500, 4000


class GatdistError(Exception):
    """Base class of all errors that gatdist raises on purpose."""

    exit_status = 1
    reported = False  # whether another process of the run has shown it


class Interruption(BaseException):
    """Raised in the main thread by a signal. No Exception: users' code catches those."""


class UserError(GatdistError):
    """An error that the user can fix, with the message ``subject = value: rule. Hint.``.

    Args:
        subject: The field, file or URL at fault, for example ``run.global_batch``.
        rule: What must hold, for example ``must divide the 6 groups of a batch``.
        value: The offending value.
        hint: How to fix it, as an imperative sentence without a full stop.

    Attributes:
        subject: As given; "" if another process raised the error.
        value: As given; None without one.
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
    """A key of the configuration is unknown, mistyped, out of range or contradicts another."""


class MissingFieldError(ConfigError):
    """Code reads a field that samples lack.

    Attributes:
        rule: As given.
        hint: As given.
    """

    def __init__(self, subject: str, rule: str, *, hint: str) -> None:
        super().__init__(subject, rule, hint=hint)
        self.rule, self.hint = rule, hint


class DataError(UserError):
    """A data set, shard, index or sample is missing, damaged or of the wrong kind."""


class StorageError(UserError):
    """A URL is missing, not permitted, not writable or of an unknown protocol."""


class CheckpointError(UserError):
    """A run directory or a checkpoint is unusable."""


class ClusterError(UserError):
    """The cluster is unreachable, misconfigured or too small."""


class PluginError(UserError):
    """A user's own module does not import, does not fit, or fails during a run."""


class RetryableError(GatdistError):
    """The same command may succeed later."""

    exit_status = 75


class StorageUnavailableError(RetryableError):
    """Storage did not answer, or kept failing, past the retry budget."""


class InterruptedRunError(RetryableError):
    """The run was asked to stop. Its state is saved, and the same command resumes it."""


class WorkerLostError(RetryableError):
    """A worker or its host failed. The run can resume from its last checkpoint."""


class TrainingError(GatdistError):
    """Training failed, for example after too many non-finite steps."""


class StaleAttemptError(TrainingError):
    """A newer start of the same run has taken over. This one must not write any more."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: ``Did you mean 'fid'? Known: fid, kid``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return "".join(f"Did you mean {name!r}? " for name in close) + f"Known: {', '.join(known)}"


def rebuilt(kind: str, message: str) -> GatdistError:
    """Return another process's error, given the name of its class and its message."""
    found = globals().get(kind, GatdistError)
    error: GatdistError = found.__new__(found)
    error.args = (message,)
    return error


# Classes are compared by name: commands that need no networks do not import torch.


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another worker is gone. Gloo has no class for that."""
    by_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return "DistError" in _class_names(error) or by_gloo


def is_broken_device(error: BaseException) -> bool:
    """Whether the device itself failed; one that is only out of memory would fail again."""
    names = _class_names(error)
    of_cuda = isinstance(error, RuntimeError) and "CUDA error" in str(error)
    return "OutOfMemoryError" not in names and ("AcceleratorError" in names or of_cuda)


def lost_worker(error: RuntimeError, here: str) -> WorkerLostError | None:
    """Return the error of a worker that lost the others or its device, else None.

    ``here`` names the worker.
    """
    if is_lost_connection(error):
        why = "another worker died, or the network failed"
        return WorkerLostError(f"{here} lost its connections: {why}")
    if is_broken_device(error):
        return WorkerLostError(f"the device of {here} failed: {str(error).splitlines()[0]}")
    return None


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


# The line of a traceback, or of its copy within another message, that says what was raised.
_RAISED = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning): \S"
)


def summary(error: BaseException) -> str:
    """Return an error's message in one line: the first line of the last chained error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised[-1] if raised else lines[0])[:_MOST_CHARACTERS]


# Control characters except line ends, tabs and colors: others move the cursor, or worse.
_CONTROLS = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")


def for_terminal(text: str) -> str:
    """Return untrusted text with control characters escaped and long lines cut."""
    escaped = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    return "\n".join(_cut(line, _LONGEST_PART) for line in escaped.split("\n"))


def _cut(text: str, most: int) -> str:
    """Return both ends of a text that is longer than ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
