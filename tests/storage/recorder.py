"""A web server that records requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Recorder(ThreadingHTTPServer):
    """A server that records method, path and headers of each request."""

    def __init__(self, folder: Path | None = None, redirects: dict[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.redirects = folder, redirects or {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path in self.server.redirects:
            self._answer(302, b"", Location=self.server.redirects[path])
        elif self.server.folder and (file := self.server.folder / path[1:]).is_file():
            content = file.read_bytes()
            if requested := self.headers.get("Range"):
                first, last = map(int, requested.removeprefix("bytes=").split("-"))
                total, content = len(content), content[first : last + 1]
                self._answer(206, content, **{"Content-Range": f"bytes {first}-{last}/{total}"})
            else:
                self._answer(200, content)
        else:
            self._answer(404, b"")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def recording(
    folder: Path | None = None, redirects: dict[str, str] | None = None
) -> Iterator[Recorder]:
    server = Recorder(folder, redirects)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
