"""The last collectives of this worker, from torch's flight recorder.

They are read as JSON: torch's own dump files are pickles, which gatdist does not open.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_SHOWN = 20


class Flight(NamedTuple):
    """Numbers of collectives of the newest process group, from 1; 0 for none.

    The numbers are the same on all workers, which make the same collectives.
    """

    launched: int  # the last one that this worker has launched
    started: int | None  # by its device; None if torch does not record it
    completed: int
    text: str  # the last ones, a line each


def flight() -> Flight | None:
    """Return what this worker's recorder holds; None without a process group or recorder.

    Any thread may call this while another one waits in a collective.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    import torch._C._distributed_c10d as c10d

    names = ["_dump_nccl_trace_json"] if dist.get_backend() == "nccl" else []
    for name in (*names, "_dump_fr_trace_json"):
        if hasattr(c10d, name):
            return parse_flight(json.loads(getattr(c10d, name)()))
    return None


def parse_flight(record: dict[str, Any]) -> Flight | None:
    """Return what a recorder's JSON says; None if it is empty or has another format."""
    try:
        # Each process numbers its own groups: workers that have changed have had several.
        groups = record["pg_status"]
        status = groups[max(groups, key=int)]
        launched, started, completed = (
            int(status[f"last_{what}_collective"]) for what in ("enqueued", "started", "completed")
        )
        entries = [_line(entry) for entry in record["entries"][-_SHOWN:]]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    text = f"collectives: launched {launched}, completed {completed}; the last ones:\n"
    known = started if started >= 0 else None
    return Flight(max(launched, 0), known, max(completed, 0), text + "\n".join(entries))


def _line(entry: dict[str, Any]) -> str:
    # Gloo's are always "scheduled", but retired once they are over.
    state = "over" if entry.get("retired") else entry.get("state", "unknown")
    what = entry.get("profiling_name", "?")
    sizes = entry.get("input_sizes", "?")
    return f"  {entry.get('collective_seq_id', '?')} {what} {sizes}: {state}"
