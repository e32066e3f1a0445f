"""Servers for all tests of this folder, each started at most once, on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from hostile import dataset, evil, refused  # noqa: F401  fixtures
from servers import Server


@pytest.fixture(scope="session", autouse=True)
def plain_gcs() -> Iterator[None]:
    """Otherwise gcsfs, on import, queries each bucket's type by gRPC, which takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def s3rver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.s3rver(tmp_path_factory.mktemp("s3rver")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs(plain_gcs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address and the served folder; see ``servers.nginx``."""
    with servers.nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server
