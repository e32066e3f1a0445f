"""Every command of the documents is run, or parsed by its real parser if it can't run here.

Commands run in a folder with a reader's files (``newcomer``), document by document and in order,
with small networks and few samples. ``ELSEWHERE`` lists commands that need more than one process,
the reason, and the test that runs them; their options are still parsed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import gatdist
import newcomer
from conditional_runs import train_translation, train_vocoder
from documents import REPOSITORY, Command, blocks, documents
from gatdist.cli import main, parser
from gatdist.config import load_config, parse_config
from support import HANG_S

# Replacements for addresses that do not exist here.
STAND_INS = {
    "s3://bucket/": "bucket/",
    "s3://mine/": "mine/",
    "https://": "runs/",
    "RUN": "runs/classes",
}
# Documents whose TOML blocks are scenarios, not configurations.
SCENARIOS = ("docs/how-to/simulate.md",)
# Patterns of commands, why they are not run here, and the tests that run them instead.
ELSEWHERE = (
    (r"gatdist .*--address", "a Ray cluster is needed", "tests/cluster"),
    (r"gatdist apply .*--workers", "Ray is started", "tests/cluster/test_applying_on_ray.py"),
    (r"gatdist train .*--workers", "Ray is started", "tests/cluster/test_launch.py"),
    (
        r"(torchrun|srun) ",
        "several processes are needed",
        "tests/distributed/test_torchrun.py",
    ),
    (r"gatdist bench scaling", "Ray is started", "tests/cluster/test_scaling.py"),
    (r"gatdist bench step", "minutes of measuring", "tests/unit/test_bench_step.py"),
    (r"gatdist simulate my\.toml", "it needs what was measured", "tests/unit/test_simulate.py"),
    (r"ray (start|job submit)", "a Ray cluster is needed", "tests/cluster/hosts"),
    (r"ray (up|exec|down|dashboard)", "a cloud is needed", "tests/deploy/test_launcher_files.py"),
    (
        r"'?(aws |gcloud |az |id=\$\(az|for role|done|export RAY_AUTH|\(umask)",
        "a cloud is needed",
        "tests/deploy/test_launcher_files.py",
    ),
    (r"python deploy/launcher/check", "a file is needed", "tests/deploy/test_launcher_files.py"),
    (
        r"'?(kubectl |HEAD=)",
        "Kubernetes is needed",
        "tests/deploy/test_kubernetes.py",
    ),
    (
        r"'?(sky |~/sky|python3 -m venv '~/sky'|export 'RAY_AUTH)",
        "a cloud is needed",
        "tests/deploy/test_skypilot_file.py",
    ),
    (r"sbatch |scancel |tail ", "Slurm is needed", "tests/cluster/hosts/test_slurm.py"),
    (
        r"'?(prometheus |here=|GATDIST_BOARDS)",
        "servers are started",
        "tests/deploy/test_monitoring.py",
    ),
    (r"tensorboard ", "a server is started", "tests/browser/test_tensorboard.py"),
    (
        r"gatdist .*inception",
        "the published weights are needed",
        "tests/numerics/test_published_inception.py",
    ),
    (
        r"gatdist (import|sample runs/ffhq|evaluate runs/ffhq)",
        "published weights are needed",
        "tests/numerics/test_published_networks.py",
    ),
    (r"make ", "it installs, or runs the tests themselves", ".ci/run"),
    (r"pip install ", "it installs", "pyproject.toml"),
    (r"python -m benchmarks", "hours of measuring", "benchmarks/README.md"),
    (
        r"python tests/fake_cuda",
        "it needs a process without torch",
        "tests/fake_cuda/test_budgets.py",
    ),
    (r"\. \.venv/bin/activate$", "it belongs to the shell", "Makefile"),
)


@pytest.fixture(scope="module")
def reader_files(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """Create the files of a reader, and finished runs with and without classes. Tests copy it."""
    folder = tmp_path_factory.mktemp("newcomer")
    newcomer.write_reader_files(folder)
    for name, classes in (("digits", "false"), ("classes", "true")):
        train = ["train", "digits", "--local", "--run-dir", str(folder / "runs" / name)]
        assert main(newcomer.small([*train, "--set", f"model.conditional={classes}"])) == 0
    train_vocoder(folder / "runs" / "vocoder")
    train_translation(folder / "runs" / "edges")
    for other in ("runs/photos", "bucket/runs/mine"):
        shutil.copytree(folder / "runs" / "digits", folder / other)
    return folder


@pytest.fixture
def work_folder(reader_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the reader's files and make the copy the current folder, also for imports."""
    folder = tmp_path / "reader_files"
    shutil.copytree(reader_files, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(gatdist, "load_config", newcomer.load_small_config, raising=False)
    monkeypatch.setattr(gatdist, "train", newcomer.train_in_this_process, raising=False)
    return folder


@pytest.mark.parametrize("document", documents())
def test_commands_of_document_run(
    document: str, work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if document in ("README.md", "docs/tutorial/first-run.md"):
        shutil.rmtree(work_folder / "runs" / "digits")  # trained by the commands of the document
    for block in blocks(document):
        place = f"{document}:{block.line}"
        if block.file:
            Path(block.file).write_text(block.text)
            if block.language == "toml" and document not in SCENARIOS:
                load_config(block.file)
        elif block.language == "python":
            exec(compile(block.text, place, "exec"), {"__name__": "__main__"})  # noqa: S102
        elif block.language == "toml":
            if document not in SCENARIOS:
                _configured(block.text)
        elif block.language == "sh":
            for command in block.commands():
                _run(command)
        else:
            assert block.language in ("mermaid", "text", "json", "yaml"), place
    capsys.readouterr()


def _configured(text: str) -> None:
    """Check a part of a configuration as part of the digits preset."""
    values = load_config("digits").model_dump(mode="json")
    for section, keys in tomllib.loads(text).items():
        values[section] |= keys
    parse_config(values)


def _run(command: Command) -> None:
    for pattern, _, _ in ELSEWHERE:
        if re.match(pattern, str(command)):
            _parse(command)
            return
    program, *arguments = map(_replaced, command.words)
    if program == "python" and Path(arguments[0]).is_file():  # written by the document
        subprocess.run([sys.executable, *arguments], check=True, timeout=HANG_S)
        return
    assert program == "gatdist", f"{command.place}: `{command}` is not tested (see ELSEWHERE)"
    arguments = newcomer.small(arguments)
    assert main(arguments) == 0, f"{command.place}: {shlex.join(arguments)}"


def _replaced(word: str) -> str:
    for address, stand_in in STAND_INS.items():
        word = stand_in if word == address else word.replace(address, stand_in)
    return word


def _parse(command: Command) -> None:
    """Parse the words with the program's own parser, or check them against its files."""
    program, *words = command.words
    if program == "gatdist":
        arguments = parser().parse_args(words)
        if words[0] == "train":
            preset = "digits" if arguments.preset.endswith(".toml") else arguments.preset
            load_config(preset, arguments.set)
    elif program == "ray":
        _parse_by_ray(words, command)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in words if "=" not in word]
        assert set(named) <= set(targets), command.place
    elif program == "pip":
        for extras in re.findall(r"gatdist\[([\w,]+)\]", str(command)):
            known = metadata.metadata("gatdist").get_all("Provides-Extra") or []
            assert set(extras.split(",")) <= set(known), command.place


def _parse_by_ray(words: list[str], command: Command) -> None:
    from ray.scripts.scripts import cli

    group, name = cli, words.pop(0)
    while name in group.commands and hasattr(group.commands[name], "commands"):
        group, name = group.commands[name], words.pop(0)
    options, entrypoint = words, []
    if "--" in words:
        options, entrypoint = words[: words.index("--")], words[words.index("--") + 1 :]
        _parse(Command(command.place, tuple(entrypoint)))
    group.commands[name].make_context(
        name, [*options, *(["--", *entrypoint] if entrypoint else [])]
    )


def test_tests_of_commands_run_elsewhere_exist() -> None:
    for _, _, where in ELSEWHERE:
        assert where.startswith("pyproject") or (REPOSITORY / where).exists(), where
