"""How much waits to be sent: a slow link shows in the send queues of the kernel."""

from __future__ import annotations

from pathlib import Path

_ESTABLISHED = "01"
# As the kernel writes them: 127.0.0.0/8 ends in 7F, also within IPv6; ::1.
_LOOPBACK = ("7F", "00000000000000000000000001000000")


def unsent_bytes() -> int:
    """Bytes in the send queues of all TCP connections of this host that leave it (Linux).

    0 where the kernel does not tell.
    """
    total = 0
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, _, remote, state, queues = line.split()[:5]
            if state == _ESTABLISHED and not remote.partition(":")[0].endswith(_LOOPBACK):
                total += int(queues.partition(":")[0], 16)
    return total
