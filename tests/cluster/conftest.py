"""One Ray for all tests of this folder: starting it takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import ray_head


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a Ray with 2 CPUs."""
    options = "--num-cpus=2", "--object-store-memory=100000000"
    env = {"RAY_AUTH_MODE": "disabled"}
    with ray_head(tmp_path_factory.mktemp("ray"), *options, env=env) as address:
        yield address
