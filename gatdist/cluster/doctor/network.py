"""Measures the network between hosts: TCP pair by pair, and all-reduce."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from gatdist.cluster.doctor.report import Exchange

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_T = TypeVar("_T")

MESSAGE_BYTES = (4_000, 64_000, 1_000_000, 16_000_000)
_CONNECT_S = 5.0
_SEND_S = 0.5
_DRAIN_S = 30.0
# Bytes in flight when sending ends, which must arrive before the time is up.
_BUFFER_BYTES = 2**20
_GROUP_S = 20.0
_MEASURE_S = 1.0  # per message size
_LONGEST_S = 4.0  # messages that would take longer are skipped
_ROUNDS = 3, 50


class Listener:
    """Accepts connections, and answers each with the number of bytes that arrived.

    The system chooses the ``port``, as for Gloo and NCCL.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="doctor-listener", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    count, buffer = 0, bytearray(_BUFFER_BYTES)
    with connection, suppress(OSError):
        connection.settimeout(_DRAIN_S)
        while got := connection.recv_into(buffer):
            count += got
        connection.sendall(str(count).encode())


def failures(targets: Mapping[str, int]) -> dict[str, str]:
    """Return the errors of listeners (ports by address) that can't be reached, by address."""

    def attempt(target: tuple[str, int]) -> str:
        try:
            _send(*target, 0.0)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(32) as pool:
        errors = zip(targets, pool.map(attempt, targets.items()), strict=True)
        return {address: error for address, error in errors if error}


def sending_rate(address: str, port: int) -> float:
    """Return the bytes per second that arrive at a listener over one connection.

    Raises:
        OSError: the connection failed.
    """
    began = time.perf_counter()
    arrived = _send(address, port, _SEND_S)
    return arrived / (time.perf_counter() - began)


def _send(address: str, port: int, seconds: float) -> int:
    """Send for some seconds; returns how many bytes arrived."""
    block = memoryview(bytes(_BUFFER_BYTES // 4))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        connection.settimeout(_CONNECT_S)
        connection.connect((address, port))
        connection.settimeout(_DRAIN_S)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(32) or 0)


def rendezvous(address: str, port: int = 0) -> TCPStore:
    """Return the store of a process group, served here if no port is given.

    Raises:
        torch.distributed.DistError: the store can't be reached.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        address,
        port,
        is_master=not port,
        timeout=timedelta(seconds=_GROUP_S),
        wait_for_workers=False,
    )


def all_reduces(store: TCPStore, rank: int, world_size: int, backend: str) -> list[Exchange]:
    """Form a process group of at least 2 ranks and time its all-reduce by message size.

    NCCL uses the first GPU. Large messages are skipped where they would take too long.

    Raises:
        RuntimeError: the group can't be formed, or a collective failed.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_GROUP_S),
    )
    try:
        found: list[Exchange] = []
        for num_bytes in MESSAGE_BYTES:
            if found and _expected_s(found[-1], num_bytes) > _LONGEST_S:
                break
            seconds = _median_s(torch.zeros(num_bytes // 4, device=device))
            carried = 2 * (world_size - 1) / world_size * num_bytes
            found.append(Exchange(num_bytes, seconds, carried / seconds))
        return found
    finally:
        dist.destroy_process_group()


def _expected_s(last: Exchange, num_bytes: int) -> float:
    """Return a lower bound of a message's time: the last one's may be latency, not bandwidth."""
    return last.seconds * num_bytes / last.bytes if last.bytes >= 1_000_000 else last.seconds


def _median_s(message: Any) -> float:
    """Return the median time of an all-reduce, identical on every rank, as decisions need."""
    _timed(message)  # connects
    fewest, most = _ROUNDS
    once = _agreed(_timed(message), message)
    rounds = min(most, max(fewest, int(_MEASURE_S / once)))
    return _agreed(median(_timed(message) for _ in range(rounds)), message)


def _timed(message: Any) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(message)
    if message.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _agreed(seconds: float, message: Any) -> float:
    """Return the maximum over all ranks."""
    import torch
    import torch.distributed as dist

    message = torch.tensor(seconds, dtype=torch.float64, device=message.device)
    dist.all_reduce(message, dist.ReduceOp.MAX)
    return float(message)


def neighbours(addresses: Sequence[str]) -> dict[str, str]:
    """Return the receiver of each host in a ring, so that each sends once and receives once."""
    return dict(zip(addresses, [*addresses[1:], *addresses[:1]], strict=True))


def turns(ring: Sequence[_T]) -> list[list[_T]]:
    """Return the members of a ring that send at the same time, so that none sends and receives.

    Sending over a slow link would slow down what the same host receives over a fast one.
    """
    even = len(ring) // 2 * 2  # the last of an odd ring has its own turn
    return [list(turn) for turn in (ring[:even:2], ring[1:even:2], ring[even:]) if turn]
