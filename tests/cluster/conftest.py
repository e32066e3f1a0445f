"""One Ray for all tests of this folder, since starting it takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from support import free_port, ray_head


@pytest.fixture(scope="session")
def ray_metrics_url() -> str:
    """Return the URL of that Ray's metrics."""
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory, ray_metrics_url: str) -> Iterator[str]:
    """HOST:PORT of a Ray with 2 CPUs."""
    options = (
        "--num-cpus=2",
        "--object-store-memory=100000000",
        f"--metrics-export-port={urlsplit(ray_metrics_url).port}",
        '--system-config={"metrics_report_interval_ms": 500}',  # instead of 10 s
    )
    env = {"RAY_AUTH_MODE": "disabled"}
    with ray_head(tmp_path_factory.mktemp("ray"), *options, env=env) as address:
        yield address
