"""What the documents hold: their fenced blocks, and the commands in those of the shell."""

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
    """A fenced block: its language, what it holds, and the line of its first line."""

    document: str
    language: str
    line: int
    text: str

    @property
    def file(self) -> str | None:
        """The file that it is, by its first line: ``# my_networks.py``."""
        found = _FILE.match(self.text)
        return found[1] if found else None

    def commands(self) -> list[Command]:
        """Those of a block of the shell; lines that go on joined, comments and ``> …`` left out."""
        found: list[Command] = []
        begun = ""
        for number, line in enumerate(self.text.splitlines(), self.line):
            begun += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            try:
                words = shlex.split(begun, comments=True)
            except ValueError:  # a quotation that goes on
                begun += "\n"
                continue
            if words := [*takewhile(lambda word: word not in (">", "&"), words)]:
                found.append(Command(f"{self.document}:{number}", tuple(words)))
            begun = ""
        return found


@dataclass(frozen=True)
class Command:
    """A command of a document, as the shell would hand it over."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def documents() -> list[str]:
    """All that a reader may follow, by their paths in the repository."""
    found = [REPOSITORY / "README.md"]
    for pattern in ("docs/*.md", "deploy/**/*.md"):
        found += sorted(REPOSITORY.glob(pattern))
    return [str(path.relative_to(REPOSITORY)) for path in found]


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return [
        Block(document, match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in _BLOCK.finditer(text)
    ]
