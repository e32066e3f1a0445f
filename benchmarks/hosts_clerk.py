"""Runs on the head of :mod:`benchmarks.hosts` and answers what Ray knows of its nodes."""

from __future__ import annotations

import json
import sys
from typing import Any

from ray._raylet import GcsClient


def main() -> None:
    """A JSON list a line, ``["nodes"]`` or ``["drain", ID, SECONDS]``; a JSON answer a line."""
    client = GcsClient(address=sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(answer(client, *json.loads(line))), flush=True)


def answer(client: Any, question: str, *given: Any) -> Any:
    """See :func:`main`."""
    if question == "drain":
        node, seconds = given
        import time

        accepted, _ = client.drain_node(node, 2, "spot", int((time.time() + seconds) * 1000))
        return accepted
    return [
        {"name": info.node_name, "id": identity.hex(), "alive": info.state == 0}
        for identity, info in client.get_all_node_info().items()
    ]


main()
