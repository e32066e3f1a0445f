"""Parser of documents: fenced blocks, and the commands in shell blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.(?:py|toml))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text and first line."""

    document: str
    language: str
    line: int
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that it shows, from its first line: ``# my_networks.py``."""
        found = _FILE.match(self.text)
        return found[1] if found else None

    def commands(self) -> list[Command]:
        """Commands of a shell block, without comments and redirections."""
        found: list[Command] = []
        begun = ""
        for number, line in enumerate(self.text.splitlines(), self.line):
            begun += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            try:
                words = shlex.split(begun, comments=True)
            except ValueError:  # a multi-line quotation
                begun += "\n"
                continue
            if words := [*takewhile(lambda word: word not in (">", "&"), words)]:
                found.append(Command(f"{self.document}:{number}", tuple(words)))
            begun = ""
        return found


@dataclass(frozen=True)
class Command:
    """A command of a document, split into words."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def documents() -> list[str]:
    """Return paths of the documents whose commands are run, relative to the repository."""
    found = [REPOSITORY / "README.md"]
    for pattern in ("docs/**/*.md", "deploy/**/*.md"):
        found += sorted(REPOSITORY.glob(pattern))
    found = [path for path in found if path.parent.name != "reference"]
    return [str(path.relative_to(REPOSITORY)) for path in found]


def blocks(document: str) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return [
        Block(document, match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in _BLOCK.finditer(text)
    ]
