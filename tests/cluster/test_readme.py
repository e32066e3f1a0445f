"""The Python code of the README runs unchanged, with few samples."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

README = Path(__file__).parents[2] / "README.md"
FEW = '"cluster.workers=2", "run.total_samples=256", "evaluate.every_samples=0"'


def test_readme_code_trains_two_workers(tmp_path: Path) -> None:
    networks, script = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert '"cluster.workers=2"' in script
    (tmp_path / "my_gan.py").write_text(networks)
    (tmp_path / "train.py").write_text(script.replace('"cluster.workers=2"', FEW))
    finished = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert finished.returncode == 0, finished.stderr
    last = (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["throughput/workers"] == 2
    assert (tmp_path / "mine.png").exists()
