"""Chooses the network interface of the workers' process group.

Gloo binds to the address of the host's name, which on every Debian is 127.0.0.1, so that the first
collective between two hosts fails. The interface that carries Ray's own address works. NCCL chooses
interfaces itself, and uses several at once.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_NEED_ONE = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
VARIABLES = (*_NEED_ONE, "NCCL_SOCKET_IFNAME")

_SIOCGIFADDR = 0x8915  # Linux: "get the address of an interface"


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each network interface that has one, by name."""
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
    """Return the name of the interface that carries ``address``; None if none does."""
    return next((name for name, own in interfaces().items() if own == address), None)


def address_towards(host: str) -> str:
    """Return this host's IPv4 address on the way to ``host``; "" if there is none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it only asks the routing table
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def unused_port(address: str) -> int:
    """Return a port of this host's ``address`` that is free at present."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])


def choose_interface(address: str) -> None:
    """Let Gloo use the interface of this host's ``address``, unless the user has chosen one."""
    name = interface_of(address)
    if name is not None:
        for variable in _NEED_ONE:
            os.environ.setdefault(variable, name)
