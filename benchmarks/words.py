"""Words: English words of 3 to 12 letters, as shards for `gatdist train words`.

python -m benchmarks.words data/words [--list /usr/share/dict/american-english]

The list is Debian's package `wamerican`; of its words those of small letters a to z are taken.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gatdist.data import write_dataset
from gatdist.storage import Store

LIST = "/usr/share/dict/american-english"
SHORTEST, LONGEST = 3, 12
NUM_SHARDS = 4


def main() -> None:
    """Write the words."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", help="a folder, or any URL that fsspec knows")
    parser.add_argument("--list", default=LIST, help=f"one word a line (default: {LIST})")
    arguments = parser.parse_args()
    found = words(Path(arguments.list).read_text(encoding="utf-8"))
    # In a fixed, mixed order: neighbours in a shard should not be alike.
    order = np.random.default_rng(0).permutation(len(found))

    def shard(numbers: NDArray[np.int64]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in numbers:
            yield f"{i:06d}", {"txt": found[order[i]].encode()}

    write_dataset(
        Store(arguments.destination),
        (shard(numbers) for numbers in np.array_split(np.arange(len(found)), NUM_SHARDS)),
        modality="text",
        sample_shape=(LONGEST,),
    )
    print(f"{len(found):,} words in {arguments.destination}")


def words(text: str) -> list[str]:
    """Those that are taken, each once, in the order of the list."""
    pattern = re.compile(rf"[a-z]{{{SHORTEST},{LONGEST}}}")
    return list(dict.fromkeys(word for word in text.split() if pattern.fullmatch(word)))


if __name__ == "__main__":
    main()
