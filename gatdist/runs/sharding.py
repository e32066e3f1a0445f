"""Sharding of checkpoints: which files one has, and which worker writes and reads each of them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence

# A larger group of tensors is split. While a file is written, it is a second copy of its tensors.
FILE_BYTES = 2**26
_FILE = re.compile(r"([A-Za-z0-9_]+)(?:-\d{5,}-of-\d{5,})?\.safetensors")

# Names of tensors, by the file that holds them.
Layout = dict[str, list[str]]


def layout(sizes: Mapping[str, int]) -> Layout:
    """Return the files for tensors of the given bytes, whatever the number of workers.

    The part of a tensor's name before the first ``/`` is its group. A group has one file, such as
    ``average.safetensors``, or, above FILE_BYTES, several, each with whole tensors and named as is
    usual for large models: ``average-00001-of-00003.safetensors``.
    """
    groups: dict[str, list[str]] = {}
    for name in sizes:
        groups.setdefault(name.partition("/")[0], []).append(name)
    files: Layout = {}
    for group, names in sorted(groups.items()):
        parts: list[list[str]] = []
        filled = 0
        for name in names:
            filled += sizes[name]
            if not parts or filled > FILE_BYTES:
                parts.append([])
                filled = sizes[name]
            parts[-1].append(name)
        for number, part in enumerate(parts, 1):
            numbered = f"-{number:05}-of-{len(parts):05}" if len(parts) > 1 else ""
            files[f"{group}{numbered}.safetensors"] = part
    return files


def group_of(file: str) -> str:
    """Return the group of the tensors in a file; "" if it holds none."""
    match = _FILE.fullmatch(file)
    return match[1] if match else ""


def shares(sizes: Mapping[str, int], num_workers: int) -> list[list[str]]:
    """Divide files of the given bytes among workers; return the files of each, by rank.

    There are as many shares of FILE_BYTES or more as possible: one, of worker 0, if all is smaller.
    Those who get one are spread over the ranks, since the workers of a host have successive ones.
    The largest files come first, each to the worker with the fewest bytes (Graham 1969).
    """
    num_shares = max(1, min(num_workers, sum(sizes.values()) // FILE_BYTES))
    found: list[list[str]] = [[] for _ in range(num_workers)]
    filled = [(0, number * num_workers // num_shares) for number in range(num_shares)]
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        num_bytes, rank = filled[0]
        heapq.heapreplace(filled, (num_bytes + sizes[file], rank))
        found[rank].append(file)
    return found


def layout_of_each(sizes: Mapping[str, int], num_workers: int) -> list[Layout]:
    """Return the files that each worker writes, by rank, for tensors of the given bytes."""
    files = layout(sizes)
    in_files = {file: sum(sizes[name] for name in names) for file, names in files.items()}
    return [{file: files[file] for file in mine} for mine in shares(in_files, num_workers)]


def is_sharded(each: Sequence[Layout | list[str]]) -> bool:
    """Return whether workers beside worker 0 have files."""
    return any(each[1:])
