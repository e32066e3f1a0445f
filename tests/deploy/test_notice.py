"""Preemption notices from clouds' metadata services."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.launcher.notice import CLOUDS

TOKEN = "AQAEAtoken"


class Service(BaseHTTPRequestHandler):
    """Metadata service as documented by the clouds; ``server.answers`` maps paths to bodies."""

    def _answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        requested = self.path == "/latest/api/token"
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._answer(200 if requested and seconds else 400, TOKEN)

    def do_GET(self) -> None:
        asks = {"/latest": ("X-aws-ec2-metadata-token", TOKEN), "/metadata": ("Metadata", "true")}
        asks["/computeMetadata"] = ("Metadata-Flavor", "Google")
        header, value = next(asks[start] for start in asks if self.path.startswith(start + "/"))
        if self.headers.get(header) != value:
            return self._answer(401)
        body = self.server.answers.get(self.path)
        return self._answer(404) if body is None else self._answer(200, body)

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@pytest.fixture
def service() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.answers = {}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def left(cloud: str, service: ThreadingHTTPServer) -> float | None:
    return CLOUDS[cloud](f"http://127.0.0.1:{service.server_address[1]}")


ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


def event(kind: str, machine: str, when: str) -> str:
    message = f'"EventType": "{kind}", "Resources": ["{machine}"], "NotBefore": "{when}"'
    return f'{{"DocumentIncarnation": 1, "Events": [{{{message}}}]}}'


QUIET = {
    "aws": [{}],
    "gcp": [{PREEMPTED: "FALSE"}, {}],
    "azure": [
        {EVENTS: '{"DocumentIncarnation": 0, "Events": []}'},
        {EVENTS: event("Reboot", "me", ""), NAME: "me"},
        {EVENTS: event("Preempt", "another", ""), NAME: "me"},
    ],
}


def notice(cloud: str, seconds: float) -> dict[str, str]:
    """Return a service's answer with this many seconds left; Google's has no time."""
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return {
        "aws": {ACTION: f'{{"action": "terminate", "time": "{when:%Y-%m-%dT%H:%M:%SZ}"}}'},
        "gcp": {PREEMPTED: "TRUE"},
        "azure": {
            EVENTS: event("Preempt", "me", format_datetime(when, usegmt=True)),
            NAME: "me\n",
        },
    }[cloud]


@pytest.mark.parametrize("cloud", QUIET)
def test_no_notice_returns_none(cloud, service):
    for answers in QUIET[cloud]:
        service.answers = answers
        assert left(cloud, service) is None


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 100), ("gcp", 30), ("azure", 100)])
def test_notice_returns_remaining_seconds(cloud, seconds, service):
    service.answers = notice(cloud, seconds)
    assert seconds - 20 < left(cloud, service) <= seconds


def test_event_that_has_begun(service):
    service.answers = {EVENTS: event("Preempt", "me", ""), NAME: "me"}
    assert left("azure", service) == 0


@pytest.mark.parametrize("cloud", CLOUDS)
def test_unresponsive_service(cloud, service):
    service.answers = {ACTION: "no JSON", EVENTS: "no JSON"}
    if cloud != "gcp":
        with pytest.raises(ValueError, match="Expecting value"):
            left(cloud, service)
    with pytest.raises(OSError, match="refused"):
        CLOUDS[cloud]("http://127.0.0.1:9")
