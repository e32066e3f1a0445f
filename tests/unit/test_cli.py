"""Commands: output, errors and exit status."""

import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

import gatdist
from gatdist.cli import main
from gatdist.common.errors import StorageError
from gatdist.storage import Store
from support import HANG_S, end_group, start_gatdist, wait_until

TINY = [
    "run.total_samples=96",
    "run.global_batch=8",
    "run.log_every_samples=32",
    "run.checkpoint_every_samples=32",
    "run.keep_checkpoints=2",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "monitor.tensorboard=false",
    "evaluate.metrics=[]",
    "evaluate.every_samples=0",
]


def train(run_dir, *more, settings=(), preset="digits"):
    """Return the status of ``gatdist train --local``."""
    sets = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    return main(["train", preset, "--local", "--run-dir", str(run_dir), *sets, *more])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished small run, read-only."""
    folder = tmp_path_factory.mktemp("run")
    assert train(folder) == 0
    return folder


def checkpoint_of(run_dir, samples_seen):
    """Return the folder of the checkpoint with this number of samples."""
    (found,) = (run_dir / "checkpoints").glob(f"{samples_seen:09d}.*")
    return found


def test_run_writes_the_documented_files(run_dir):
    assert {"config.json", "attempts.jsonl", "metrics.jsonl", "samples", "checkpoints"} <= set(
        os.listdir(run_dir)
    )
    names = sorted(os.listdir(run_dir / "checkpoints"))
    assert [name.partition(".")[0] for name in names] == ["000000064", "000000096"]
    assert all(re.fullmatch(r"\d{9}\.1-[0-9a-f]{12}", name) for name in names)
    assert (run_dir / "samples" / "fakes-000000096.png").exists()
    assert json.loads((run_dir / "config.json").read_text())["run"]["total_samples"] == 96
    (attempt,) = [
        json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()
    ]
    assert attempt["attempt"] == 1
    assert attempt["world_size"] == 1
    assert attempt["resumed_from"] is None


def test_metrics_have_the_documented_keys(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines] == [32, 64, 96]
    for line in lines:
        assert line["world_size"] == 1
        assert line["wall_time_s"] > 0
        for tag in (
            "loss/generator",
            "loss/discriminator",
            "logits/real",
            "logits/fake",
            "gradient_norm/generator",
            "gradient_norm/discriminator",
            "learning_rate/generator",
            "throughput/samples_per_s",
            "time/data_s",
            "time/generator_s",
            "time/discriminator_s",
            "time/optimizer_s",
            "time/communication_s",
            "health/skipped_steps",
        ):
            assert isinstance(line[tag], float), tag
    assert "penalty/r1" in lines[0]


def test_inspect_describes_runs_checkpoints_and_data_sets(run_dir, capsys):
    for url, kind in ((run_dir, "run"), (checkpoint_of(run_dir, 96), "checkpoint")):
        assert main(["inspect", str(url), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["kind"] == kind
        assert main(["inspect", str(url)]) == 0
        assert kind in capsys.readouterr().out
        assert main(["inspect", str(url), "--digest"]) == 0
        digest = capsys.readouterr().out.strip()
        assert len(digest) == 64
        assert digest == (found.get("checkpoint") or found)["digest"]


def test_sample_writes_the_same_file_for_the_same_number_and_seed(run_dir, tmp_path, capsys):
    for out, num, seed in (("a", 3, 0), ("b", 2, 0), ("c", 2, 1)):
        assert (
            main(
                [
                    "sample",
                    str(run_dir),
                    "--num",
                    str(num),
                    "--seed",
                    str(seed),
                    "--out",
                    str(tmp_path / out),
                ]
            )
            == 0
        )
    assert sorted(os.listdir(tmp_path / "a")) == ["000000.png", "000001.png", "000002.png"]
    contents = {
        out: [(tmp_path / out / f"00000{i}.png").read_bytes() for i in (0, 1)] for out in "abc"
    }
    assert contents["a"] == contents["b"]
    assert contents["a"] != contents["c"]
    with Image.open(tmp_path / "a" / "000000.png") as image:
        assert image.size == (8, 8)
    assert (
        main(["sample", str(run_dir), "--num", "9", "--out", str(tmp_path / "g.png"), "--grid"])
        == 0
    )
    with Image.open(tmp_path / "g.png") as image:
        assert image.size[1] > 3 * 8


def test_json_prints_exactly_one_document(run_dir, tmp_path, capsys):
    for arguments in (
        ["inspect", str(run_dir), "--json"],
        ["sample", str(run_dir), "--num", "1", "--out", str(tmp_path / "s"), "--json"],
        ["doctor", "--json"],
    ):
        main(arguments)
        json.loads(capsys.readouterr().out)
    assert train(run_dir, "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished"


def test_dry_run_reports_the_plan_and_writes_nothing(tmp_path, run_dir, capsys):
    assert train(tmp_path / "new", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps_to_go"] == 12
    assert found["num_samples"] == 1797
    assert found["num_shards"] >= 1
    assert found["config"]["run"]["global_batch"] == 8
    assert not (tmp_path / "new").exists()
    held = sum(p.stat().st_size for p in checkpoint_of(run_dir, 96).glob("*.safetensors"))
    assert found["checkpoint_bytes"] == pytest.approx(held, rel=0.15)
    assert train(run_dir, "--dry-run") == 0
    message = capsys.readouterr().out
    for fact in ("0 steps", "sample 96", "run.global_batch = 8"):
        assert fact in message


def test_texts_require_networks_for_texts(tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("one\ntwo\nsix\n")
    gatdist.pack(str(tmp_path / "lines.txt"), str(tmp_path / "data"), workers=1)
    assert train(tmp_path / "run", settings=[f"data.url={tmp_path / 'data'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gatdist: model: ")
    assert "(256, 3)" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.totl_samples=5"], "run.totl_samples"),
        (["game.loss=nonsaturatin"], "game.loss = 'nonsaturatin'"),
        (["game.update_rule=alternate"], "game.update_rule = 'alternate'"),
        (["run.global_batch=many"], "run.global_batch = 'many'"),
        (["run.global_batch=0"], "run.global_batch = 0"),
        (["data.length=16"], "data.length = 16"),
        (["data.url=/nowhere/at/all"], "/nowhere/at/all"),
        (['plugins=["no_such_module"]'], "plugins = 'no_such_module'"),
        (
            ['evaluate.metrics=["fud"]', "evaluate.every_samples=32"],
            "evaluate.metrics = 'fud'",
        ),
        (
            ["evaluate.features=classifyer", 'evaluate.metrics=["fid"]'],
            "evaluate.features = 'classifyer'",
        ),
        (['model.discriminator={name="mlp"}'], "model"),
    ],
)
def test_invalid_settings_are_reported_in_one_message_with_status_2(
    settings, message, tmp_path, capsys
):
    assert train(tmp_path / "run", settings=settings) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gatdist: {message}: ")
    assert "Traceback" not in error


def test_rejected_setting_leaves_the_folder_usable(tmp_path):
    assert train(tmp_path / "run", settings=["game.loss=nonsaturatin"]) == 2
    assert train(tmp_path / "run", settings=["game.loss=nonsaturating"]) == 0


def test_batch_with_fewer_samples_than_workers_is_rejected_before_ray_starts(tmp_path, capsys):
    assert main(["train", "digits", "--workers", "65", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gatdist: run.global_batch = 64: ")
    assert "65 workers" in error


def test_workers_with_local_is_rejected(tmp_path, capsys):
    assert train(tmp_path, "--workers", "2") == 2
    assert "--local = True: " in capsys.readouterr().err


def test_unwritable_run_directory_is_reported(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert train(tmp_path / "file") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_other_configuration_is_rejected_but_paths_may_change(run_dir, capsys):
    before = (run_dir / "config.json").read_text()
    assert train(run_dir, settings=["game.loss=minimax"]) == 2
    error = capsys.readouterr().err
    assert "game.loss = 'minimax'" in error
    assert "'relativistic'" in error
    assert (run_dir / "config.json").read_text() == before
    assert train(run_dir, settings=["run.log_every_samples=8"]) == 0


def test_damaged_newest_checkpoint_falls_back_with_a_warning_and_ends_the_same(
    run_dir, tmp_path, capsys
):
    assert train(tmp_path, settings=["run.total_samples=96"]) == 0
    main(["inspect", str(run_dir), "--digest"])
    store = Store(str(tmp_path))
    (folder,) = (name for name in store.list("checkpoints") if name.startswith("000000096."))
    name = f"checkpoints/{folder}/discriminator.safetensors"
    content = bytearray(store.read(name))
    content[len(content) // 2] ^= 1
    store.publish(name, bytes(content))
    capsys.readouterr()
    assert train(tmp_path) == 0
    assert name in capsys.readouterr().err
    attempts = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert attempts[-1]["resumed_from"] == 64
    digests = []
    for folder in (tmp_path, run_dir):
        main(["inspect", str(folder), "--digest"])
        digests.append(capsys.readouterr().out)
    assert digests[0] == digests[1]


def test_commands_on_what_is_no_run_report_it(tmp_path, capsys):
    for arguments in (
        ["inspect", str(tmp_path)],
        ["inspect", str(tmp_path), "--digest"],
        ["sample", str(tmp_path), "--num", "1", "--out", str(tmp_path / "o")],
        ["evaluate", str(tmp_path)],
    ):
        assert main(arguments) == 2, arguments
        assert str(tmp_path) in capsys.readouterr().err


def test_run_that_is_never_finite_stops_with_status_1(tmp_path, capsys, monkeypatch):
    (tmp_path / "bad_loss.py").write_text(
        "from gatdist import register_loss\n"
        "from gatdist.game import Loss\n"
        "def broken(r, f):\n"
        "    return f * (float('nan') if len(f) > 4 else 1.0)  # finite in the startup check\n"
        "register_loss('broken', Loss(broken, lambda r, f: -f))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ["game.loss=broken", 'plugins=["bad_loss"]', "health.nonfinite_budget=2"]
    assert train(tmp_path / "run", settings=settings) == 1
    assert "health.nonfinite = 'skip'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "alarm"),
    [
        (
            ["optim.generator.learning_rate=1e-12", "optim.discriminator.learning_rate=1e-2"],
            "discriminator_won",
        ),
        (["health.exploding_norm=1e-3"], "exploding_gradient_discriminator"),
        (["health.vanishing_norm=1e3"], "vanishing_gradient_generator"),
        (["health.collapse_ratio=100.0"], "collapse"),
    ],
)
def test_alarms_are_shown_and_logged_with_the_metrics(settings, alarm, tmp_path, capsys):
    more = ["game.penalties={}", "run.total_samples=960", "run.log_every_samples=480"]
    assert train(tmp_path, settings=[*more, *settings]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].get(f"health/{alarm}") == 1.0
    assert "! " in capsys.readouterr().err


def test_converged_run_stops_early_and_reports_why(tmp_path, capsys):
    settings = [
        "run.total_samples=9600",
        'evaluate.metrics=["fid"]',
        "evaluate.num_samples=64",
        "evaluate.every_samples=32",
        'run.convergence={metric="fid", patience_samples=64, min_improvement=0.9}',
    ]
    assert train(tmp_path, "--json", settings=settings) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["status"] == "converged"
    assert "fid" in outcome["reason"]
    assert outcome["samples_seen"] < 9600
    assert train(tmp_path, "--json", settings=settings) == 0
    assert json.loads(capsys.readouterr().out) == outcome


def test_local_training_does_not_import_ray(tmp_path, run_gatdist):
    """Replace Ray by a module that raises on import."""
    (tmp_path / "ray.py").write_text("raise ImportError('no Ray here')\n")
    sets = [word for setting in TINY for word in ("--set", setting)]
    finished = run_gatdist(
        "train",
        "digits",
        "--local",
        "--run-dir",
        tmp_path / "run",
        *sets,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert finished.returncode == 0, finished.stderr
    finished = run_gatdist(
        "train", "digits", "--run-dir", tmp_path / "other", *sets, env={"PYTHONPATH": str(tmp_path)}
    )
    assert finished.returncode == 2
    assert "--local" in finished.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(tmp_path, closed):
    """As cron and daemons start commands."""
    sets = " ".join(f"--set '{setting}'" for setting in TINY)
    command = f"{sys.executable} -m gatdist train digits --local --run-dir run {sets} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=HANG_S, check=False)
    assert done.returncode == 0
    assert list(tmp_path.glob("run/checkpoints/*/MANIFEST.json"))


def test_thread_of_user_code_does_not_block_the_exit(tmp_path, run_gatdist):
    (tmp_path / "threads.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, name='endless').start()\n"
    )
    sets = [word for setting in TINY for word in ("--set", setting)]
    sets += ["--set", 'plugins=["threads"]']
    env = {"PYTHONPATH": str(tmp_path)}
    for more, status in (("--dry-run",), 0), (("--set", "run.global_batch=-1"), 2), ((), 0):
        words = ("train", "digits", "--local", "--run-dir", tmp_path / "run", *sets, *more)
        finished = run_gatdist(*words, env=env)
        assert finished.returncode == status, finished.stderr
        assert ("'endless'" in finished.stderr) == (status == 0)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000, "{a=" * 5000, "1" + "0" * 400])
def test_values_too_long_or_nested_too_deep_are_rejected(tmp_path, capsys, value):
    (tmp_path / "own.toml").write_text(f"[run]\nseed = {value}\n")
    for words in (["digits", "--set", f"run.seed={value}"], [str(tmp_path / "own.toml")]):
        assert main(["train", *words, "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("gatdist: ")
        assert len(error) < 20_000


def test_deleted_current_folder_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("gatdist: ")
    with pytest.raises(StorageError):
        gatdist.load("run")


def test_empty_run_directory_is_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--local", "--run-dir", ""]) == 2
    assert not list(tmp_path.iterdir())


def test_pathlib_paths_are_accepted(run_dir, tmp_path):
    (tmp_path / "own.toml").write_text('[run]\ntotal_samples = 64\n[data]\nurl = "builtin:ring"\n')
    assert gatdist.load_config(tmp_path / "own.toml").run.total_samples == 64
    assert gatdist.load(run_dir) is not None
    (written,) = gatdist.sample(run_dir, 1, out=tmp_path / "fakes")
    assert os.path.exists(written)
    for wrong in (3, b"x", None):
        with pytest.raises(StorageError):
            gatdist.load(wrong)
    with pytest.raises(StorageError):
        gatdist.export(run_dir, "safetensors", out="a\0b")


def test_library_that_replaces_signal_handlers_does_not_prevent_a_stop(tmp_path):
    (tmp_path / "deaf.py").write_text(
        "import signal\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
    )
    endless = ["run.total_samples=8000000", 'plugins=["deaf"]']
    sets = [word for setting in (*TINY, *endless) for word in ("--set", setting)]
    command = ["train", "digits", "--local", "--run-dir", "run", *sets]
    process = start_gatdist(*command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    try:
        wait_until((tmp_path / "run/metrics.jsonl").exists, "a log interval")
        process.terminate()
        assert process.wait(60) == 75
    finally:
        end_group(process)
        process.communicate()
    assert list(tmp_path.glob("run/checkpoints/*/MANIFEST.json"))
