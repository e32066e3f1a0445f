"""Drain this host: announce its end to Ray, and wait until nothing runs on it.

Run ``python -m gatdist.cluster.drain --within 100`` where a host learns of its end: in the
``preStop`` hook of a Kubernetes pod, or in the handler of a cloud's preemption notice. A run on the
host then writes a checkpoint and continues elsewhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from gatdist.cluster.connection import reachable  # sets up Ray's import

# isort: split
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    DRAIN_NODE_REASON_PREEMPTION,
)
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

from gatdist.cluster.network import interfaces
from gatdist.common.errors import ClusterError, GatdistError

_LOOK_S = 0.5


def drain(within_s: float, address: str = "auto") -> bool:
    """Drain Ray's nodes on this host and wait until they are gone. They leave when they are idle.

    Returns whether they left within ``within_s`` seconds. ``auto`` finds the head as Ray does.

    Raises:
        ClusterError: Ray's head does not answer or rejects our token.
    """
    deadline = time.time() + within_s
    found = reachable(address)
    if ":" not in found:
        raise ClusterError("cluster.address", "no Ray runs on this host", value=address)
    gcs = GcsClient(address=found)
    reason = f"taken away in {within_s:g} s"
    for node in _own(gcs):
        gcs.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, reason, int(deadline * 1e3))
    while _own(gcs):
        if time.time() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _own(gcs: Any) -> list[str]:
    """Return the ids of the nodes on this host that are alive."""
    addresses = set(interfaces().values())
    return [
        identity.hex()
        for identity, node in gcs.get_all_node_info().items()
        if node.state == GcsNodeInfo.ALIVE and node.node_manager_address in addresses
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. The exit status is 0 if the nodes left in time, else 1."""
    parser = argparse.ArgumentParser(prog="python -m gatdist.cluster.drain", description=__doc__)
    parser.add_argument(
        "--within", type=float, required=True, metavar="SECONDS", help="until the host goes away"
    )
    parser.add_argument("--address", default="auto", metavar="HOST:PORT", help="of Ray's head")
    given = parser.parse_args(arguments)
    try:
        return 0 if drain(given.within, given.address) else 1
    except GatdistError as error:
        parser.exit(error.exit_status, f"gatdist: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
