"""Slurm's script, as shipped and with mistakes. ``tests/cluster/hosts`` runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "deploy/slurm/train.sbatch"
# Options without which a job is lost or connects to another job's Ray, and why.
NEEDED = {
    "nodes": "how many machines a job has must be said",
    "time": "without a limit, no signal comes before it",
    "requeue": "a job whose node dies would not come back",
    "signal": "without B:TERM@seconds no checkpoint is written before the limit",
    "exclusive": "two Rays of a user on a node get in each other's way",
    "ntasks-per-node": "must be 1: one Ray a node",
    "gpus-per-node": "without it Slurm gives no GPU",
    "open-mode": "without append each attempt overwrites the log of the last",
    "output": "without %j jobs overwrite each other's logs",
}
RULES = {
    "signal": r"B:TERM@\d+", "ntasks-per-node": "1", "open-mode": "append", "output": ".*%j.*",
    "nodes": r"\d+(-\d+)?", "gpus-per-node": r"(\w+:)?\d+", "time": r"[\d:-]+",
}  # fmt: skip


def read(text: str, folder: Path) -> list[str]:
    """Return findings of shellcheck."""
    script = folder / "train.sbatch"
    script.write_text(text)
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [program, "--format=gcc", script], capture_output=True, text=True, check=False
    )
    return [line.removeprefix(f"{folder}/") for line in done.stdout.splitlines()]


def message(text: str) -> list[str]:
    """Return errors in the settings of a script, by option or command."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    lines = re.findall(r"^#SBATCH (?!--[\w-]+(?:=\S+)?$).*", text, re.MULTILINE)
    found = [f"train.sbatch: {line}: is no option" for line in lines]
    for name, why in NEEDED.items():
        if name not in options:
            found.append(f"train.sbatch: --{name}: is missing: {why}")
        elif not re.fullmatch(RULES.get(name, ""), options[name]):
            found.append(f"train.sbatch: --{name} = {options[name]!r}: {why}")
    known = {*NEEDED, "job-name", "mem"}
    found += [f"train.sbatch: --{name}: is not known" for name in options.keys() - known]
    first = text.find("\nset -euo pipefail")
    if first < 0 or "#SBATCH" in text[first:]:
        found.append("train.sbatch: #SBATCH: Slurm reads no option after the first command")
    for words, why in {
        "export RAY_AUTH_MODE=token": "anyone could run code on the nodes",
        "umask 077": "the token could be read by all",
        "RAY_USAGE_STATS_ENABLED=0": "Ray would send usage statistics",
        "-eq 75": "status 75 must be retried",
    }.items():
        if words not in text:
            found.append(f"train.sbatch: {words}: is missing: {why}")
    if re.search(r"\b[0-9a-f]{32,}\b|AKIA[0-9A-Z]{16}|RAY_AUTH_TOKEN=", text):
        found.append("train.sbatch: RAY_AUTH_TOKEN: a secret lies in the script")
    return found


def test_shipped_script_is_valid(tmp_path):
    text = FILE.read_text()
    assert message(text) == read(text, tmp_path) == []


SEEDED = {
    "a misspelled option": ("--requeue", "--requeues", "train.sbatch: --requeues: is not known"),
    "a malformed option": (
        "#SBATCH --nodes=2", "#SBATCH nodes=2", "train.sbatch: #SBATCH nodes=2: is no option",
    ),
    "an option without a value": (
        "--gpus-per-node=8", "--gpus-per-node", "train.sbatch: --gpus-per-node = ''",
    ),
    "no limit": ("#SBATCH --time=24:00:00\n", "", "train.sbatch: --time: is missing"),
    "no requeue": ("#SBATCH --requeue\n", "", "train.sbatch: --requeue: is missing"),
    "a signal to Ray, not to the script": (
        "--signal=B:TERM@300", "--signal=TERM@300", "train.sbatch: --signal = 'TERM@300'",
    ),
    "two Rays a node": (
        "--ntasks-per-node=1", "--ntasks-per-node=8", "train.sbatch: --ntasks-per-node = '8'",
    ),
    "an overwritten log": (
        "--output=%x-%j.log", "--output=train.log", "train.sbatch: --output = 'train.log'",
    ),
    "an option after the first command": (
        "set -euo pipefail", "set -euo pipefail\n#SBATCH --account=me",
        "train.sbatch: #SBATCH: Slurm reads no option after",
    ),
    "no token mode": (
        "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled",
        "train.sbatch: export RAY_AUTH_MODE=token: is missing",
    ),
    "a token in the script": (
        "export RAY_AUTH_MODE=token", "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=x",
        "train.sbatch: RAY_AUTH_TOKEN: a secret",
    ),
}  # fmt: skip
SLIPS = {
    "an unquoted word": (
        'scontrol requeue "$SLURM_JOB_ID"', "scontrol requeue $SLURM_JOB_ID", "[SC2086]",
    ),
    "an unset variable": ('"ended with status $status"', '"ended with $stat"', "[SC2154]"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", [*SEEDED, *SLIPS])
def test_mistake_is_reported(mistake, tmp_path):
    good, bad, expected = (SEEDED | SLIPS)[mistake]
    text = FILE.read_text()
    assert good in text
    wrong = text.replace(good, bad, 1)
    found = message(wrong) if mistake in SEEDED else read(wrong, tmp_path)
    assert any(expected in line for line in found), found
