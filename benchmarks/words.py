"""Words: English words of 3 to 12 lower-case letters, as shards for ``gatdist train words``.

python -m benchmarks.words data/words [--list /usr/share/dict/american-english]

The list is Debian's package ``wamerican``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from benchmarks.case import shuffled_shards
from gatdist.data import write_dataset
from gatdist.storage import Store

LIST = "/usr/share/dict/american-english"
SHORTEST, LONGEST = 3, 12
NUM_SHARDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", help="a folder, or any URL that fsspec knows")
    parser.add_argument("--list", default=LIST, help=f"one word a line (default: {LIST})")
    arguments = parser.parse_args()
    found = words(Path(arguments.list).read_text(encoding="utf-8"))
    write_dataset(
        Store(arguments.destination),
        shuffled_shards(len(found), NUM_SHARDS, lambda number: {"txt": found[number].encode()}),
        modality="text",
        sample_shape=(LONGEST,),
    )
    print(f"{len(found):,} words in {arguments.destination}")


def words(text: str) -> list[str]:
    pattern = re.compile(rf"[a-z]{{{SHORTEST},{LONGEST}}}")
    return list(dict.fromkeys(word for word in text.split() if pattern.fullmatch(word)))


if __name__ == "__main__":
    main()
