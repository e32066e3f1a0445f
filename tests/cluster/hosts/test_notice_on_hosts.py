"""A cloud's preemption notice reaches Ray through the watcher on the launcher's workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts
from support import end_group, wait_until

pytestmark = pytest.mark.hosts

WATCHER = Path(__file__).resolve().parents[3] / "deploy/launcher/notice.py"


def test_notice_drains_the_node(hosts: Hosts, tmp_path: Path) -> None:
    first, _ = hosts.workers
    service = tmp_path / "computeMetadata/v1/instance"
    service.mkdir(parents=True)
    (service / "preempted").write_text("FALSE")
    serve = [sys.executable, "-m", "http.server", "8099", "--bind", "127.0.0.1"]
    address = hosts.head.ray_address
    watch = [sys.executable, WATCHER, "gcp", address, "--service", "http://127.0.0.1:8099"]
    log = tmp_path / "notice.log"

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = first.start(*serve, "--directory", tmp_path, **quiet)
    with log.open("w") as message:
        watcher = first.start(*watch, stdout=message, stderr=message)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(4)  # it is listening, and has printed nothing
        assert "notice" not in log.read_text()
        assert first.name in hosts.alive()
        (service / "preempted").write_text("TRUE")
        assert watcher.wait(60) == 0, log.read_text()
        assert "30 s" in log.read_text()
        # The node is idle: Ray releases it at once.
        wait_until(lambda: sorted(hosts.alive()) == ["head", "w2"], "the node to go")
    finally:
        end_group(watcher)
        end_group(server)
        first.kill()  # as the cloud would; the next test starts with it rejoined
