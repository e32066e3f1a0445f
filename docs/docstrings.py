"""Parse Google-style docstrings and convert them to Markdown."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any


def fields_of(model: type) -> dict[str, str]:
    """Return the docstring below each annotated field of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in itertools.pairwise(tree.body):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = sentence(markdown(" ".join(text.split())))
    return found


def args_of(thing: Any, title: str) -> dict[str, str]:
    """Return the entries of a Google-style section of a docstring by name."""
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
    """Yield the lines of a section without its indentation."""
    inside = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if re.match(r"\w+:$", line):
            inside = line == f"{title}:"
        elif inside and line.strip():
            yield line.removeprefix("    ")


def prose(thing: Any) -> Iterator[str]:
    """Yield a docstring up to its first section, as Markdown."""
    yield from (markdown(text) + "\n" for text in paragraphs(thing))


def paragraphs(thing: Any) -> list[str]:
    """Return the paragraphs of a docstring up to its first section."""
    text = re.split(r"^\w+:$", inspect.getdoc(thing) or "", maxsplit=1, flags=re.MULTILINE)[0]
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def markdown(text: str) -> str:
    """Convert reStructuredText markup to Markdown."""
    text = re.sub(r":\w+:`~?\.?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def sentence(text: str) -> str:
    """Capitalize and end with a full stop, unless the text starts with code."""
    text = text if text.startswith(("`", "ψ")) else text[0].upper() + text[1:]
    return text if text.endswith((".", "…", "!")) else text + "."
