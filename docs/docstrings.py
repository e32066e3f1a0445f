"""Google-style docstrings, taken apart and turned into Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any


def message(model: type) -> dict[str, str]:
    """Of each attribute, what the docstring's section ``Attributes`` says."""
    return args_of(model, "Attributes")


def args_of(thing: Any, title: str) -> dict[str, str]:
    """A Google-style section of a docstring, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in section_of(thing, title):
        if match := re.match(r"(\w+)(?: \(.*?\))?: (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] += " " + line.strip()
    return {name: sentence(markdown(text)) for name, text in found.items()}


def section_of(thing: Any, title: str) -> Iterator[str]:
    """The lines of a section, its own indentation taken away."""
    inside = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if re.match(r"\w+:$", line):
            inside = line == f"{title}:"
        elif inside and line.strip():
            yield line.removeprefix("    ")


def prose(thing: Any) -> Iterator[str]:
    """A docstring before its sections."""
    yield from (markdown(text) + "\n" for text in paragraphs(thing))


def paragraphs(thing: Any) -> list[str]:
    """Of a docstring, before its first section."""
    text = re.split(r"^\w+:$", inspect.getdoc(thing) or "", maxsplit=1, flags=re.MULTILINE)[0]
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def markdown(text: str) -> str:
    """ReStructuredText's signs as Markdown's."""
    text = re.sub(r":\w+:`~?\.?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def sentence(text: str) -> str:
    """With a capital and a full stop, unless it begins with code."""
    text = text if text.startswith(("`", "ψ")) else text[0].upper() + text[1:]
    return text if text.endswith((".", "…", "!")) else text + "."
