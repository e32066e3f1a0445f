"""Runs every case that this machine can run, one after the other: ``python -m benchmarks``."""

from __future__ import annotations

from benchmarks.cases import digits

if __name__ == "__main__":
    digits.main()
