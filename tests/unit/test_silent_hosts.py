"""Hosts that do not answer are distinguished from those that do."""

import socket
import time

from gatdist.cluster.nodes import silent_hosts


def test_hosts_that_do_not_answer_are_found_within_seconds():
    with socket.socket() as listening, socket.socket() as closed:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        closed.bind(("127.0.0.1", 0))  # and does not listen
        addresses = {
            "up": listening.getsockname(),
            "down": closed.getsockname(),
            "unreachable": ("192.0.2.255", 9),  # TEST-NET-1
        }
        began = time.monotonic()
        assert silent_hosts(addresses) == {"down", "unreachable"}
        assert time.monotonic() - began < 5
    assert silent_hosts({}) == set()
