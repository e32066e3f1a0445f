"""Runs every case that this machine can run, one after the other: ``python -m benchmarks``."""

from __future__ import annotations

from benchmarks.cases import digits, games, overlap, remedies, ring

if __name__ == "__main__":
    for case in (games, overlap, remedies, ring, digits):
        case.main()
