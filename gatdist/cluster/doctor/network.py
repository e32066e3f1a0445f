"""The network between hosts, measured in one process on each: TCP pair by pair, and all-reduce."""

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
# What may be under way when sending ends, and must arrive before the time is up.
_BUFFER_BYTES = 2**20
_GROUP_S = 20.0
_MEASURE_S = 1.0  # of each message size, about
_LONGEST_S = 4.0  # a message that would take longer is not sent
_ROUNDS = 3, 50


class Listener:
    """Takes connections at an address, and answers each with the number of bytes that came.

    Args:
        address: of this host.

    Attributes:
        port: where it listens, chosen by the system as gloo's and NCCL's are.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="doctor-listener", daemon=True).start()

    def close(self) -> None:
        """Take no more."""
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
    """Which listeners can't be reached from here, and why.

    Args:
        targets: port by address.
    """

    def attempt(target: tuple[str, int]) -> str:
        try:
            _send(*target, 0.0)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(32) as pool:
        message = zip(targets, pool.map(attempt, targets.items()), strict=True)
        return {address: error for address, error in message if error}


def sending_rate(address: str, port: int) -> float:
    """Bytes per second that arrive at a listener over one connection.

    Raises:
        OSError: the connection failed.
    """
    began = time.perf_counter()
    arrived = _send(address, port, _SEND_S)
    return arrived / (time.perf_counter() - began)


def _send(address: str, port: int, seconds: float) -> int:
    """Send for so long; returns how many bytes arrived."""
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
    """The store by which a process group finds itself: served here if no port is given.

    Raises:
        torch.distributed.DistError: it can't be reached.
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
    """Form a process group and time its all-reduce by message size.

    Args:
        store: of all ranks.
        rank: of this process.
        world_size: number of processes, at least 2.
        backend: ``gloo``, or ``nccl`` on the first GPU.

    Returns:
        What this rank has seen; large messages are left out where they would take too long.

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
    """What a message will take, at least if the last one's time was latency and not bandwidth."""
    return last.seconds * num_bytes / last.bytes if last.bytes >= 1_000_000 else last.seconds


def _median_s(message: Any) -> float:
    """Median time of an all-reduce; the same on all ranks, which decide alike by it."""
    _timed(message)  # the first one makes connections
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
    """The longest of all ranks."""
    import torch
    import torch.distributed as dist

    message = torch.tensor(seconds, dtype=torch.float64, device=message.device)
    dist.all_reduce(message, dist.ReduceOp.MAX)
    return float(message)


def neighbours(addresses: Sequence[str]) -> dict[str, str]:
    """To whom each host sends, so that each sends once and receives once, as in a ring."""
    return dict(zip(addresses, [*addresses[1:], *addresses[:1]], strict=True))


def turns(ring: Sequence[_T]) -> list[list[_T]]:
    """Who of a ring sends at the same time: in a turn nobody sends and receives.

    What a host sends over a slow link would hold up the receipts of what it gets over a fast one.
    """
    even = len(ring) // 2 * 2  # the last of an odd ring sends to the first, and has its own turn
    return [list(turn) for turn in (ring[:even:2], ring[1:even:2], ring[even:]) if turn]
