"""Output of each command, in one file per command under ``golden/``.

Other tests assert classes of errors, fields and values, so that wording may change freely; here a
change of wording shows as a diff for review. ``GOLDEN=write pytest FILE`` writes the files anew.
Numbers are masked, as they differ between machines.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from conditional_runs import RATE, clip, train_vocoder
from gatdist.cli import main
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from scenarios import OBSERVED
from small_runs import write_clips

GOLDEN = Path(__file__).parents[1] / "golden"

TINY = [
    *("run.total_samples=96", "run.global_batch=8", "run.log_every_samples=32"),
    *("run.checkpoint_every_samples=48", "evaluate.every_samples=0", "evaluate.num_samples=64"),
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
]
SETS = [word for setting in TINY for word in ("--set", setting)]
TRAIN = ["train", "digits", "--local", "--run-dir", "run", *SETS]

# Each session runs in a folder with the files of SOURCES and those of the previous commands. An
# argument {checkpoint} is the newest checkpoint's folder.
SESSIONS: dict[str, list[list[str]]] = {
    "pack": [
        ["pack", "photos", "packed", "--size", "8", "--dry-run"],
        ["pack", "photos", "packed", "--size", "8"],
        ["pack", "photos", "packed", "--size", "8"],
        ["pack", "nothing", "packed-nothing"],
    ],
    "verify": [["verify", "packed"], ["verify", "packed", "--decode"], ["verify", "damaged"]],
    "index": [["index", "tars", "--out", "indexed"], ["index", "photos", "--out", "none"]],
    "train": [
        [*TRAIN, "--dry-run"],
        TRAIN,
        TRAIN,
        [*TRAIN, "--set", "run.seed=7"],
        [*TRAIN, "--set", "run.global_batsh=7"],
        ["train", "digitz"],
    ],
    "inspect": [
        ["inspect", "run"],
        ["inspect", "{checkpoint}"],
        ["inspect", "packed"],
        ["inspect", "nothing"],
    ],
    "evaluate": [["evaluate", "run"], ["evaluate", "run", "--metric", "fod"]],
    "sample": [
        ["sample", "run", "--num", "4", "--out", "fakes"],
        ["sample", "run", "--num", "4", "--grid", "--out", "grid.png"],
        ["sample", "run", "--num", "4", "--shards", "--out", "fake-shards"],
        ["sample", "run", "--num", "4", "--labels", "x", "--out", "fakes"],
    ],
    "export": [
        ["export", "run", "--format", "safetensors", "--out", "generator.safetensors"],
        ["export", "run", "--format", "zip", "--out", "generator.zip"],
    ],
    "apply": [
        ["apply", "vocoder", "recordings", "made"],
        ["apply", "vocoder", "recordings", "made"],
        ["apply", "vocoder", "photos", "made-of-photos"],
        ["apply", "run", "photos", "made-of-photos"],
    ],
    "report": [["report", "run", "--out", "report.html"]],
    "simulate": [["simulate", "scenario.toml"], ["simulate", "nothing.toml"]],
}


def write_sources(folder: Path) -> None:
    """Photos of two classes, one of them damaged; shards; a scenario."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)))
    (folder / "photos" / "a" / "damaged.png").write_bytes(b"no image")
    write_clips(folder / "tars")
    train_vocoder(folder / "vocoder")
    (folder / "recordings").mkdir()
    for i in range(3):
        (folder / "recordings" / f"{i}.wav").write_bytes(encode_wav(clip(i), RATE))
    (folder / "recordings" / "damaged.wav").write_bytes(b"no audio")
    (folder / "scenario.toml").write_text(OBSERVED)


def damage(folder: Path) -> None:
    """Truncate a copy of the shards."""
    shutil.copytree(folder / "packed", folder / "damaged")
    shard = min((folder / "damaged").glob("**/*.tar"))
    shard.write_bytes(shard.read_bytes()[:-3000])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By session: its commands, their output, and their status."""
    folder = tmp_path_factory.mktemp("terminal")
    write_sources(folder)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for session, commands in SESSIONS.items():
            if session == "verify":
                damage(folder)
            text = "\n".join(printed(command) for command in commands)
            found[session] = masked(text, folder)
    return found


def printed(words: list[str]) -> str:
    if words[-1] == "{checkpoint}":
        words = [*words[:-1], str(max(Path("run/checkpoints").iterdir()))]
    shown = " ".join(word for word in words if word not in SETS)
    with redirect_stdout(StringIO()) as output, redirect_stderr(output):
        status = main(words)
    # The background prints these at any time.
    lines = sorted(output.getvalue().splitlines(), key=lambda line: line.startswith("checkpoint "))
    return "\n".join([f"$ gatdist {shown}", *lines, f"status {status}", ""])


def masked(text: str, folder: Path) -> str:
    """Mask what differs between machines: numbers, digests, folders, widths of columns."""
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HEX", text)
    text = re.sub(r"(?<!status )[-+]?\d[\d.,]*(?:e[-+]?\d+)?(?<![.,])", "#", text)
    text = re.sub(r"(?<= )#(:#){1,2}", "# s", text)  # durations of a minute or more
    text = re.sub(r"# ?([kMGT]?B|[mµn]?s|min|h)(/s)?\b", r"# UNIT\2", text)
    text = re.sub(r"^( *)(hosts|platform|device)( .*)$", r"\1\2  MACHINE", text, flags=re.M)
    text = re.sub(r"^ *\S*health/storage_wait_s.*\n", "", text, flags=re.M)  # only where it waits
    text = re.sub(r"\S*/tensorboard\b", "tensorboard", text)
    lines = (re.sub(r"(?<=\S) {2,}", "  ", line).rstrip() for line in text.splitlines())
    return "\n".join(re.sub("^ (?=#)", "", line) for line in lines) + "\n"


@pytest.mark.parametrize("session", SESSIONS)
def test_terminal_output(session: str, outputs: dict[str, str]) -> None:
    file = GOLDEN / f"{session}.txt"
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(outputs[session])
    assert outputs[session] == file.read_text()
