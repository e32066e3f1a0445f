"""HTTP proxy on loopback that makes a server slow and faulty, for tests and benchmarks of storage.

Faults are chosen by path and request number, so they are the same in every run.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Self

import aiohttp
from aiohttp import web
from yarl import URL

_CHUNK_BYTES = 64 * 2**10
# Headers of one connection (RFC 9110, 7.6.1).
_OF_ONE_CONNECTION = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
_ADDED_BY_AIOHTTP = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


@dataclass(frozen=True)
class Fault:
    """A fault of some requests.

    Args:
        kind: ``silence``: never answered. ``stall``, ``reset``: happens at half of the body.
            ``short``: only half of the range is sent, as if the file ended. ``ignore_range``: the
            whole file is sent with status 200. ``late``: never answered, and forwarded by
            :meth:`Proxy.deliver_late`. ``lost``: forwarded, but never answered.
        path: Shell pattern of the URL's path, for example ``*/shard-000003.tar``.
        requests: [first, stop) among the requests for one path with these methods.
        rate: If given, this share of all ranges fails instead, chosen by a hash of path and range,
            on the first request only.
        holding: Only requests with this text in a header's value.
    """

    kind: Literal[
        "refuse", "silence", "stall", "reset", "short", "flip_bit", "ignore_range", "late", "lost"
    ]
    path: str = "*"
    methods: Sequence[str] = ("GET",)
    requests: tuple[int, int] = (0, 1)
    rate: float | None = None
    holding: str = ""
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""


@dataclass
class Exchange:
    """A request, its fault, and the bytes of its body and of the answer's."""

    method: str
    path: str
    range: str
    fault: str
    num_sent: int = 0
    status: int = 0
    num_bytes: int = 0


class Proxy:
    """Proxy of ``upstream``, a URL without a path; a context manager.

    ``bytes_per_s`` is the bandwidth of a connection. The first fault that matches a request
    applies; assigning faults resets their counts.
    """

    def __init__(
        self,
        upstream: str,
        *,
        latency_s: float = 0.0,
        bytes_per_s: float = math.inf,
        faults: Sequence[Fault] = (),
    ) -> None:
        self._upstream, self._latency_s, self._bytes_per_s = upstream, latency_s, bytes_per_s
        self.url = ""
        self.exchanges: list[Exchange] = []
        self.most_at_once, self._in_progress = 0, 0
        self.faults = faults
        self._late: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gatdist-proxy")

    @property
    def faults(self) -> Sequence[Fault]:
        return self._faults

    @faults.setter
    def faults(self, faults: Sequence[Fault]) -> None:
        self._faults = tuple(faults)
        self._seen: Counter[tuple[int, str]] = Counter()

    @property
    def num_bytes(self) -> int:
        return sum(exchange.num_bytes for exchange in list(self.exchanges))

    def deliver_late(self) -> list[int]:
        """Forward the ``late`` requests in order, and return their statuses."""

        async def deliver() -> list[int]:
            late, self._late, statuses = self._late, [], []
            for request in late:
                async with self._session.request(**request, allow_redirects=False) as upstream:
                    await upstream.read()
                    statuses.append(upstream.status)
            return statuses

        return asyncio.run_coroutine_threadsafe(deliver(), self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(),
            auto_decompress=False,
            skip_auto_headers=_ADDED_BY_AIOHTTP,
        )
        self._runner = web.ServerRunner(
            web.Server(self._answer, handler_cancellation=True, access_log=None),
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        await web.SockSite(self._runner, listener).start()

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._in_progress += 1
        self.most_at_once = max(self.most_at_once, self._in_progress)
        try:
            return await self._pass_on(request)
        except ConnectionResetError:
            return web.Response()  # the client has gone
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=f"{self._upstream}: {error}")
        finally:
            self._in_progress -= 1

    async def _pass_on(self, request: web.BaseRequest) -> web.StreamResponse:
        fault = self._fault_for(request)
        kind = fault.kind if fault else ""
        num_sent = request.content_length or 0
        exchange = Exchange(request.method, request.rel_url.path, _range(request), kind, num_sent)
        self.exchanges.append(exchange)
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "silence":
            await asyncio.Event().wait()  # until the client disconnects
        if fault and kind == "refuse":
            await request.read()
            exchange.status, exchange.num_bytes = fault.status, len(fault.body)
            return web.Response(status=fault.status, headers=fault.headers, text=fault.body)
        dropped = _OF_ONE_CONNECTION | {"expect"}
        if kind == "ignore_range":
            dropped = dropped | {"range", "x-ms-range"}
        passed_on: dict[str, Any] = {
            "method": request.method,
            "url": URL(self._upstream + request.raw_path, encoded=True),
            "headers": [(n, v) for n, v in request.headers.items() if n.lower() not in dropped],
            "data": request.content if request.can_read_body else None,
        }
        if kind == "late":
            self._late.append(passed_on | {"data": await request.read()})
            await asyncio.Event().wait()
        async with self._session.request(**passed_on, allow_redirects=False) as upstream:
            if kind == "lost":
                await upstream.read()
                await asyncio.Event().wait()
            return await self._pass_back(request, upstream, exchange)

    async def _pass_back(
        self, request: web.BaseRequest, upstream: aiohttp.ClientResponse, exchange: Exchange
    ) -> web.StreamResponse:
        answer = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        for name, value in upstream.headers.items():
            if name.lower() not in _OF_ONE_CONNECTION:
                answer.headers.add(name, value)
        exchange.status = upstream.status
        kind, length = exchange.fault, upstream.content_length
        stop = (length or 0) // 2  # where the fault happens
        if kind == "short":
            answer.content_length = length = stop
        if length is None and request.method != "HEAD":
            answer.enable_chunked_encoding()
        await answer.prepare(request)
        began = self._loop.time()
        async for chunk in upstream.content.iter_chunked(_CHUNK_BYTES):
            data, sent = chunk, exchange.num_bytes
            if kind in ("short", "reset", "stall"):
                data = chunk[: stop - sent]
            elif kind == "flip_bit" and sent <= stop < sent + len(chunk):
                i = stop - sent
                data = chunk[:i] + bytes([chunk[i] ^ 1]) + chunk[i + 1 :]
            exchange.num_bytes += len(data)  # before the client can have received it
            early_s = exchange.num_bytes / self._bytes_per_s - (self._loop.time() - began)
            if early_s > 0:
                await asyncio.sleep(early_s)
            await answer.write(data)
            if kind in ("short", "reset", "stall") and exchange.num_bytes == stop:
                break
        if kind == "stall":
            await asyncio.Event().wait()
        if kind == "reset" and request.transport:
            connection = request.transport.get_extra_info("socket")
            # Closing without lingering resets the connection.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.transport.abort()
            return answer
        await answer.write_eof()
        return answer

    def _fault_for(self, request: web.BaseRequest) -> Fault | None:
        path = request.rel_url.path
        concerning = []
        for number, fault in enumerate(self._faults):
            if request.method not in fault.methods or not fnmatchcase(path, fault.path):
                continue
            if fault.holding and not any(fault.holding in v for v in request.headers.values()):
                continue
            what = path if fault.rate is None else f"{path} {_range(request)}"
            count = self._seen[number, what]
            self._seen[number, what] += 1
            first, stop = fault.requests
            if (
                first <= count < stop
                if fault.rate is None
                else count == 0 and zlib.crc32(what.encode()) < fault.rate * 2**32
            ):
                concerning.append(fault)
        return concerning[0] if concerning else None


def _range(request: web.BaseRequest) -> str:
    return str(request.headers.get("Range") or request.headers.get("x-ms-range", ""))


class ProxyProcess(NamedTuple):
    url: str
    process: subprocess.Popen[str]

    def counts(self) -> dict[str, int]:
        """Return ``num_requests``, ``num_faults`` and ``num_bytes`` of all answers' bodies."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        counts: dict[str, int] = json.loads(self.process.stdout.readline())
        return counts


@contextmanager
def proxy_process(
    upstream: str,
    *,
    latency_s: float = 0.0,
    bytes_per_s: float = math.inf,
    faults: Sequence[Fault] = (),
) -> Iterator[ProxyProcess]:
    """Run a :class:`Proxy` in its own process, which takes no time from the one measured."""
    settings = {
        "upstream": upstream,
        "latency_s": latency_s,
        "bytes_per_s": bytes_per_s,
        "faults": [asdict(fault) for fault in faults],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        yield ProxyProcess(process.stdout.readline().strip(), process)
    finally:
        process.communicate()


def _main(settings: dict[str, Any]) -> None:
    faults = [Fault(**fault) for fault in settings.pop("faults")]
    with Proxy(**settings, faults=faults) as proxy:
        print(proxy.url, flush=True)
        for _ in sys.stdin:  # each line asks for the counts
            counts = {
                "num_requests": len(proxy.exchanges),
                "num_faults": sum(bool(exchange.fault) for exchange in list(proxy.exchanges)),
                "num_bytes": proxy.num_bytes,
            }
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
