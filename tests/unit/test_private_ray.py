"""The private parts of Ray that gatdist uses are listed with their reasons, and exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import gatdist

CLUSTER = Path(gatdist.__file__).parent / "cluster"
PAGE = Path(__file__).resolve().parents[2] / "docs/explanation/architecture.md"
ROWS = re.compile(r"^\| `(ray\.[\w.]+)` \| (\S.*) \|$", re.MULTILINE)
LISTED = dict(ROWS.findall(PAGE.read_text()))


def is_private(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("_") or part == "generated" for part in parts)


def imported() -> set[str]:
    """Return the private names of Ray that the code imports."""
    found = set()
    for file in CLUSTER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith("ray")}
    return {name for name in found if is_private(name)}


def resolved(name: str):
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise ImportError(name)


@pytest.mark.parametrize("name", LISTED)
def test_it_exists_in_this_version_of_ray(name):
    resolved(name)


def test_all_that_is_imported_is_listed_and_nothing_else():
    used = imported()
    assert not {name for name in used if not any(one.startswith(name) for one in LISTED)}
    of_imports = {name for name in LISTED if not any(name.startswith(one) for one in used)}
    # Used as attributes of objects that Ray passes, and overridden.
    assert of_imports == {
        "ray.train.backend.Backend.has_replica_groups",
        "ray.train.v2._internal.execution.worker_group.ReplicaGroup.shutdown",
        "ray.train.v2._internal.execution.worker_group.WorkerGroup.get_replica_groups",
        "ray.train.v2._internal.execution.worker_group.WorkerGroup.has_started",
        "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._create_default_callbacks",
    }


def test_replica_groups_are_off_unless_a_backend_asks_for_them():
    """Else Ray Train would replace workers that are to end together."""
    assert resolved("ray.train.backend.Backend.has_replica_groups") is False
