"""Command line and records of the cases."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.bench.environment import environment

RESULTS = Path(__file__).parent / "results"


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--out``, described by the first line of the case's docstring."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=(doc or "").partition("\n")[0]
    )
    out = RESULTS / f"{time.strftime('%Y-%m-%d')}_{name}"
    made.add_argument("--out", type=Path, default=out, help="default: results/DATE_NAME")
    return made


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def save(out: Path, result: Mapping[str, Any], indent: int | None = 1, **more: Any) -> None:
    facts = environment("torch", "ray", "numpy", "fsspec", "tensorboard", **more)
    write_json(out / "result.json", {**result, "environment": facts}, indent)


def write_json(path: Path, values: Mapping[str, Any], indent: int | None = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n")


def gatdist_command(*words: str, settings: Sequence[str] = ()) -> list[str]:
    sets = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "gatdist", *words, *sets]


def shuffled_shards(
    count: int, num_shards: int, sample: Callable[[int], dict[str, bytes]]
) -> Iterator[Iterator[tuple[str, dict[str, bytes]]]]:
    """Yield shards of ``count`` samples in a fixed random order, for ``write_dataset``."""
    order = np.random.default_rng(0).permutation(count)

    def shard(numbers: NDArray[np.int64]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in numbers:
            yield f"{i:06d}", sample(int(order[i]))

    return (shard(numbers) for numbers in np.array_split(np.arange(count), num_shards))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
