"""Which network interface the workers' process group must use.

Gloo binds to what the host's name resolves to, on every Debian 127.0.0.1, so that the first
collective between two hosts fails. The interface that carries Ray's own address works.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import MutableMapping

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")

_SIOCGIFADDR = 0x8915  # Linux: "get the address of an interface"


def interfaces() -> dict[str, str]:
    """IPv4 address of each network interface that has one, by the interface's name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_of(address: str) -> str | None:
    """Name of the interface that carries ``address``; None if there is none on this host."""
    return next((name for name, own in interfaces().items() if own == address), None)


def choose_interface(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Point the process group's libraries to the interface of ``address``, unless the user has.

    Args:
        address: of this host, as Ray knows it.
        environment: where the libraries look.
    """
    name = interface_of(address)
    if name is not None:
        for variable in VARIABLES:
            environment.setdefault(variable, name)
