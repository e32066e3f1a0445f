"""Registries of what a configuration can name, and calls of users' code."""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from gatdist.common.errors import (
    ConfigError,
    GatdistError,
    Interruption,
    MissingFieldError,
    PluginError,
    is_broken_device,
    is_lost_connection,
    nearest,
)

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name; ``field`` is the configuration key that holds a name, for messages."""

    def __init__(self, field: str) -> None:
        self.field = field
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds an entry. Raises PluginError if the name is taken."""

        def add(entry: T) -> T:
            if self._entries.setdefault(name, entry) is not entry:
                raise PluginError(
                    self.field, "that name is registered already", value=name, hint="Choose another"
                )
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ConfigError(self.field, f"not known. {nearest(name, self._entries)}", value=name)
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)


def call_with_options(
    function: Callable[..., T], options: Mapping[str, Any], field: str, **given: Any
) -> T:
    """Call ``function(**given, **options)`` if the options fit its signature.

    Args:
        function: A function or class with annotated keyword arguments.
        options: From the user's configuration.
        field: Configuration key of the options, for messages.
        given: Arguments that the user must not set.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type.
    """
    allowed = [name for name in inspect.signature(function).parameters if name not in given]
    for name in options:
        if name not in allowed:
            raise ConfigError(
                f"{field}.{name}", f"unknown key. {nearest(name, [*allowed, 'name'])}"
            )
    check = validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    try:
        if isinstance(function, type):  # only its __init__ can be checked
            kind: Any = function
            if kind.__init__ is object.__init__:  # takes nothing, and has no signature
                return kind()
            made: T = kind.__new__(kind)
            check(kind.__init__)(made, **given, **options)
            return made
        return check(function)(**given, **options)
    except ValidationError as error:
        key, rule, value = validation_problem(error)
        if error.errors()[0]["type"] == "missing_keyword_only_argument":
            raise ConfigError(f"{field}.{key}", "is required") from None
        raise ConfigError(f"{field}.{key}", rule, value=value) from None


def validation_problem(error: ValidationError) -> tuple[str, str, Any]:
    """Return the dotted key, the rule and the value of the first error that pydantic found."""
    problem = error.errors()[0]
    rule = problem["msg"]
    return ".".join(map(str, problem["loc"])), rule[0].lower() + rule[1:], problem["input"]


@contextmanager
def user_code(subject: str, doing: str, *, value: object, hint: str = "") -> Iterator[None]:
    """Turn exceptions of users' code into a PluginError that names the line.

    Args:
        subject: Configuration key that names the code.
        doing: What fails, for the message: "fails in its constructor".
        value: Of the key.
        hint: How to fix it.

    Raises:
        PluginError: chained to the exception, whose traceback ``gatdist train --debug`` prints.
        MissingFieldError: of ``subject``, with the line.
    """
    try:
        yield
    except MissingFieldError as error:
        if (frame := users_frame(error)) is None:
            raise
        rule = f"{error.rule} ({_line(frame)})"
        raise MissingFieldError(subject, rule, hint=error.hint) from error
    except (GatdistError, KeyboardInterrupt, Interruption):
        raise
    except BaseException as error:
        if is_machines_fault(error):
            raise
        raise PluginError(
            subject, f"{doing} ({described(error)})", value=value, hint=hint
        ) from error


def described(error: BaseException) -> str:
    """Return an exception's class and first line, and the user's line that raised it."""
    try:
        text = str(error)
    except Exception:  # of the user's class
        text = "its message is unreadable"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith(_TORCHSCRIPT):
        lines = [lines[-1].removeprefix("RuntimeError: ")]
    message = type(error).__name__
    if lines:
        message += f": {''.join(c if c.isprintable() else ' ' for c in lines[0][:500].rstrip('.'))}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _LIBRARIES.search(frame.filename)]
    if not own:
        return message
    return f"{message}, {_line(own[-1])}"


def _line(frame: traceback.FrameSummary) -> str:
    return f"at {frame.filename}:{frame.lineno}: {frame.line}"


def is_machines_fault(error: BaseException) -> bool:
    """Whether a device or another worker failed, unless users' code itself raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and _is_users(frames[-1].filename, ()):
        return False
    return is_lost_connection(error) or is_broken_device(error)


def users_frame(error: BaseException, plugins: Iterable[str] = ()) -> traceback.FrameSummary | None:
    """Return the innermost frame in users' code, or None.

    An installed package is users' code only if ``plugins`` names a module of it.
    """
    packages = {name.partition(".")[0] for name in plugins}
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename, packages)]
    return own[-1] if own else None


def _is_users(filename: str, packages: Collection[str]) -> bool:
    if filename.startswith(_FOLDER):
        return False
    if installed := _INSTALLED.search(filename):
        return installed[1] in packages
    # torch compiles networks to modules in a temporary folder.
    return not filename.startswith(("<", *_STANDARD)) and "torchinductor" not in filename


_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# Begins messages in which the stack of a TorchScript program precedes the reason.
_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter"
_STANDARD = [sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")]
_INSTALLED = re.compile(r"[\\/](?:site|dist)-packages[\\/](\w+)")
# Frames that say little.
_LIBRARIES = re.compile(
    rf"^{re.escape(_FOLDER)}|[\\/](site|dist)-packages[\\/](torch|pydantic|numpy)[\\/]"
    r"|^<|[\\/]lib(?:64)?[\\/]python3\.\d+[\\/](?!site-packages|dist-packages)"
)
