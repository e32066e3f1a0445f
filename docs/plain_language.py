"""Find expressions that have a standard term: ``python -m docs.plain_language``.

The exit status is 1 if one occurs. Comments, docstrings, names and messages of the code, its tests
and its benchmarks are checked, too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PATTERNS = (
    "*.md",
    "benchmarks/*.md",
    "benchmarks/**/*.py",
    "docs/**/*.md",
    "gatdist/**/*.py",
    "gatdist/**/*.toml",
    "tests/**/*.py",
    "deploy/**/*",
    "Makefile",
)
# A pattern of an expression, and what to write instead.
EXPRESSIONS = {
    r"(?<!\.)(?<!def )tells?|told": "report, log, print, show, state",
    r"mend(s|ed|ing)?": "fix; in an error: hint",
    r"borne?": "tolerate, survive",
    r"befalls?|befell": "happen to, failure model",
    r"behind (its|the|their|training's) backs?": "asynchronously, in the background",
    r"alike (on|everywhere|for)": "identical on every rank",
    r"so many of": "number of",
    r"of what is possible": "of the measured upper bound",
    r"made good|makes good": "recovery time",
    r"by heart": "overfit",
    r"halves of the real(?! data| samples)": "real-vs-real FID",
    r"rightly": "correctly; label accuracy, pairwise accuracy",
    r"left out|leaves out|leaving out": "skip, omit",
    r"enlarged": "upscale",
    r"h[eo]lds? (the )?others up": "straggler",
    r"carried on( to)?": "extrapolate",
    r"in its turn|in their turn": "in order; re-raised on every call",
    r"eight (of ten|tenths)": "80 % interval",
    r"moves? nobody|nobody moves": "skip the step on every rank",
    r"tak(e|es|en|ing) apart": "parse",
    r"exhibits?": "preview",
    r"heeds?|heeded": "respect, follow, use",
    r"no digits left": "underflow",
    r"logits? a sample": "per sample",
    r"pictures?": "image",
    r"sounds": "audio",
    r"verdicts?": "decision, check",
    r"pulses?": "heartbeat",
    r"one's own|of yours": "your own",
}
# Justified exceptions: a path, and text in which an expression may occur.
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    # A package of Debian, and its folder.
    "gatdist/config/presets/prompts-vocos.toml": ("asterisk-core-sounds", "asterisk/sounds"),
    "docs/reference/presets.md": ("asterisk-core-sounds", "asterisk/sounds"),
    "CHANGELOG.md": ("`logits/pairs_ranked_rightly`",),
    "tests/docs/test_plain_language.py": (
        "The doctor tells of it.",
        "moves nobody",
        "moves_nobody",
    ),
}
# In names, an underscore separates words.
_ANY = "|".join(EXPRESSIONS).replace(" ", "[ _]")
_FOUND = re.compile(rf"(?<![^\W_])(?:{_ANY})(?![^\W_])", re.IGNORECASE)


def main() -> int:
    found = [line for path in files() for line in check(path)]
    print("\n".join(found) or "no expression that has a standard term")
    return int(bool(found))


def files() -> list[Path]:
    """Return the files that are checked."""
    found = {path for pattern in PATTERNS for path in REPOSITORY.glob(pattern)}
    names = {".md", ".py", ".toml", ".yaml", ".yml", ".sbatch", ""}
    return sorted(path for path in found if path.is_file() and path.suffix in names)


def check(path: Path) -> Iterator[str]:
    """Yield one line per expression in a file: place, expression, standard term."""
    name = str(path.relative_to(REPOSITORY))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for match in _FOUND.finditer(line):
            if not any(text in line for text in EXCEPTIONS.get(name, ())):
                yield f"{name}:{number}: {match[0]!r}: write {standard_term(match[0])}"


def standard_term(expression: str) -> str:
    """Return what to write instead of an expression."""
    words = expression.replace("_", " ")
    return next(
        term for key, term in EXPRESSIONS.items() if re.fullmatch(key, words, re.IGNORECASE)
    )


if __name__ == "__main__":
    sys.exit(main())
