"""What the user asked of a source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """How to read a source; None leaves it to be recognized.

    Attributes:
        kind: see :data:`~gatdist.packing.sources.KINDS`.
        labels: ``none``, ``folders``, a column of a table, a field of WebDataset's ``.json``, or
            the path of a CSV or JSON file that names each file's class.
        column: of a table, the one that holds the samples.
    """

    kind: str | None = None
    labels: str | None = None
    column: str | None = None
