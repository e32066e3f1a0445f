"""Runs whose generator has inputs: held-out samples, previews, metrics and best checkpoints."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import gatdist
from gatdist.cli import main
from gatdist.common.errors import ConfigError, DataError, PluginError
from gatdist.config import ConvergenceConfig, load_config
from gatdist.data.codecs.audio import encode_wav, read_audio
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import write_dataset
from gatdist.game.task_contract import examine_task
from gatdist.game.tasks import Task
from gatdist.monitor.metrics import read_metrics
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints
from gatdist.runs.checkpoints import Name, Retention
from gatdist.runs.inspection import digest
from gatdist.runs.report import report
from gatdist.storage import Store
from gatdist.training.health import Convergence
from gatdist.training.loop import run
from gatdist.training.plan import check
from support import spawn

SIDE, RATE, LENGTH, COUNT = 16, 8000, 2000, 40
RUN = [
    "run.total_samples=96",
    "run.global_batch=12",
    "run.log_every_samples=48",
    "run.checkpoint_every_samples=48",
    "evaluate.every_samples=48",
    "data.held_out=0.3",
    "game.penalties={}",
    "game.loss=least_squares",
    "run.keep_checkpoints=1",
]
TRANSLATION = [
    *RUN,
    'game.task={name="translation"}',
    'model.generator={name="unet", width=4, norm="instance"}',
    'model.discriminator={name="patchgan", width=4, layers=1, norm="instance"}',
    "game.terms={l1={weight=100.0}}",
    'evaluate.metrics=["psnr", "ssim", "l1", "swd"]',
    "evaluate.features=points",
    "run.keep_best_checkpoints=1",
    "run.best_metric=psnr",
]
VOCODER = [
    *RUN,
    'game.task={name="vocoder", crop=512, hop=16, window=64, bands=12, highest=3000.0}',
    'model.generator={name="hifigan", version="v3", upsampling=[4, 4], width=8}',
    'model.discriminator={name="hifigan", periods=[2, 3], scales=2, period_width=2, '
    "scale_width=16}",
    "game.terms={log_mel={weight=45.0, hop=16, window=64, bands=12}}",
    'evaluate.metrics=["log_mel", "stft", "pitch", "l1"]',
]


def write_pairs(folder, count=COUNT, seed=0):
    """Write gray images, and the same in color; a sample's number is in its first pixel."""
    rng = np.random.default_rng(seed)

    def samples():
        for i in range(count):
            gray = rng.integers(0, 256, (SIDE, SIDE, 1), np.uint8)
            gray[0, 0] = i
            color = np.concatenate([gray, 255 - gray, gray // 2], 2)
            yield f"{i:03d}", {"target.png": encode_png(color), "input.png": encode_png(gray)}

    write_dataset(
        Store(str(folder)),
        [samples()],
        modality="image",
        sample_shape=[3, SIDE, SIDE],
        component="target.png",
        fields={
            "input": {
                "modality": "image",
                "sample_shape": [1, SIDE, SIDE],
                "component": "input.png",
            }
        },
    )
    return str(folder)


def write_clips(folder):
    """Write clips of recordings, two each."""
    times = np.arange(LENGTH) / RATE

    def samples():
        for i in range(COUNT):
            wave = 0.5 * np.sin(2 * np.pi * (100 + 5 * i) * times)
            yield f"r{i // 2}-{i % 2:05d}", {"wav": encode_wav(wave[None].astype(np.float32), RATE)}

    write_dataset(
        Store(str(folder)),
        [samples()],
        modality="audio",
        sample_shape=[1, LENGTH],
        sample_rate=RATE,
    )
    return str(folder)


def train(comm, url, run_dir, overrides):
    events = []
    config = load_config("digits", [f"data.url='{url}'", *overrides])
    outcome = run(
        config, comm, Store(run_dir), emit=lambda kind, fields: events.append((kind, fields))
    )
    return outcome, events


def train_in_group(comm, url, run_dir, overrides):
    return train(comm, url, run_dir, overrides)[0]


@pytest.fixture(scope="module")
def alone():
    return LocalCommunicator(torch.device("cpu"))


@pytest.fixture(scope="module")
def translation(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("translation")
    url, run_dir = write_pairs(folder / "data"), str(folder / "run")
    outcome, events = train(alone, url, run_dir, TRANSLATION)
    return url, run_dir, outcome, events


@pytest.fixture(scope="module")
def vocoder(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocoder")
    url, run_dir = write_clips(folder / "data"), str(folder / "run")
    outcome, _ = train(alone, url, run_dir, VOCODER)
    return url, run_dir, outcome


def evaluated(run_dir):
    return [log for log in read_metrics(Store(run_dir)).records if "protocol" in log]


def test_translation_is_measured_on_held_out_samples(translation):
    _, run_dir, outcome, events = translation
    assert outcome["status"] == "finished"
    logs = evaluated(run_dir)
    assert len(logs) == 2
    protocol = logs[-1]["protocol"]
    assert protocol["split"] == "held out, share 0.3"
    assert protocol["num_real"] == protocol["num_generated"] < COUNT
    values = {name: logs[-1][f"metric/{name}"] for name in ("psnr", "ssim", "l1", "swd")}
    assert values == {name: outcome["metrics"][name] for name in values}
    assert 5 < values["psnr"] < 40
    assert -1 <= values["ssim"] < 1
    assert 0 < values["l1"] < 1
    assert not [fields for kind, fields in events if kind == "note"]


def test_the_parts_of_the_generators_loss_are_logged(translation, vocoder):
    (_, pairs, *_), (_, clips, _) = translation, vocoder
    for run_dir, name, weight in ((pairs, "l1", 100.0), (clips, "log_mel", 45.0)):
        for log in read_metrics(Store(run_dir)).records:
            assert log["loss/terms"] == pytest.approx(weight * log[f"term/{name}"], rel=1e-5)
            parts = log["loss/adversarial"] + log["loss/terms"]
            assert log["loss/generator"] == pytest.approx(parts, rel=1e-5)


def test_a_discriminator_has_not_won_while_terms_train_the_generator(alone, tmp_path):
    url = write_pairs(tmp_path / "data")
    for weight in (100.0, 1e-9):
        easy = ["health.won_accuracy=0.501", f"game.terms.l1.weight={weight}"]
        more = ["optim.discriminator.learning_rate=0.01", "evaluate.metrics=[]", *easy]
        more += ["run.keep_best_checkpoints=0", "evaluate.every_samples=0"]
        run_dir = str(tmp_path / str(weight))
        _, events = train(alone, url, run_dir, [*TRANSLATION, *more])
        logs = read_metrics(Store(run_dir)).records
        assert max(log["logits/pairwise_accuracy"] for log in logs) > 0.501
        alarms = {fields["name"] for kind, fields in events if kind == "alarm"}
        assert ("discriminator_won" in alarms) == (weight < 1)


def test_the_checkpoint_with_the_highest_psnr_is_kept(translation):
    _, run_dir, _, _ = translation
    by_samples = {log["samples_seen"]: log["metric/psnr"] for log in evaluated(run_dir)}
    best = max(by_samples, key=by_samples.__getitem__)
    kept = Checkpoints(Store(run_dir).child("checkpoints")).committed()
    assert any(int(name.split(".")[0]) == best for name in kept)


def test_previews_show_input_output_and_target_of_held_out_samples(translation):
    url, run_dir, _, _ = translation
    store = Store(run_dir)
    names = [name for name in store.find() if name.startswith("samples/")]
    assert sorted(names) == ["samples/fakes-000000048.png", "samples/fakes-000000096.png"]
    image = np.asarray(Image.open(io.BytesIO(store.read(names[-1]))))
    config = load_config("digits", [f"data.url='{url}'", *RUN])
    held_out = open_dataset(config.data).held_out()
    records, _ = held_out.read(np.array([0]))
    target = held_out.sample_format.to_network(torch.from_numpy(records))
    given = held_out.sample_format.inputs(torch.from_numpy(records))["input"]
    # Cells of 48 pixels, 4 from the border, 2 apart, below the titles.
    top, left, cell, gap = 14 + 4, 4, 48, 2
    for column, expected in enumerate((given.expand(-1, 3, -1, -1), None, target)):
        x = left + column * (cell + gap)
        shown = image[top : top + cell : 3, x : x + cell : 3]
        if expected is not None:
            levels = ((expected[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
            assert (shown == levels).all()
    assert image.ndim == 3


def test_evaluate_measures_the_same_again(translation, vocoder):
    for _, run_dir, outcome, *_ in (translation, vocoder):
        found = gatdist.evaluate(run_dir)
        assert found["metrics"] == outcome["metrics"]
        assert found["protocol"]["split"] == "held out, share 0.3"


def test_evaluate_against_other_pairs(translation, tmp_path):
    _, run_dir, outcome, _ = translation
    other = write_pairs(tmp_path / "other", 9, seed=5)
    found = gatdist.evaluate(run_dir, ["psnr", "l1"], against=other)
    assert found["num_samples"] == 9
    assert found["protocol"]["split"] == "all real"
    assert found["metrics"]["psnr"] != outcome["metrics"]["psnr"]


def test_evaluate_against_statistics_uses_the_inputs_of_the_run(translation, tmp_path):
    url, run_dir, *_ = translation
    points = ["evaluate.features=points"]
    file = gatdist.statistics(url, tmp_path / "targets", overrides=points)["file"]
    found = gatdist.evaluate(run_dir, ["fid"], against=file, overrides=points)
    assert found["num_samples"] == evaluated(run_dir)[-1]["protocol"]["num_real"]
    assert found["metrics"]["fid"] > 0
    with pytest.raises(ConfigError) as caught:
        gatdist.evaluate(run_dir, ["fid"], COUNT, against=file, overrides=points)
    assert caught.value.subject == "evaluate.num_samples"


def test_vocoder_is_measured_and_heard(vocoder):
    _, run_dir, outcome = vocoder
    assert outcome["status"] == "finished"
    for name in ("log_mel", "stft", "stft_convergence", "pitch_voicing", "l1"):
        assert np.isfinite(outcome["metrics"][name])
    store = Store(run_dir)
    shown = min(8, evaluated(run_dir)[-1]["protocol"]["num_real"])
    wave = read_audio(store.read("samples/fakes-000000096.wav"))
    assert wave[0].shape[-1] == shown * 2 * (LENGTH + RATE // 4)
    image = np.asarray(Image.open(io.BytesIO(store.read("samples/fakes-000000096.png"))))
    assert image.shape[2] == 3


def test_the_report_shows_metrics_and_previews(translation):
    _, run_dir, _, _ = translation
    page, lacks = report(run_dir)
    assert not lacks
    assert page.index("<dt>psnr</dt>") < page.index("<dt>ssim</dt>") < page.index("<dt>l1</dt>")
    assert "generated, at 96 samples" in page


def test_workers_measure_alike(translation, vocoder, tmp_path):
    canonical = ["run.reduction=canonical", "run.virtual_workers=4"]
    for number, (url, overrides) in enumerate(
        [(translation[0], TRANSLATION), (vocoder[0], VOCODER)]
    ):
        found = []
        for workers in (1, 2, 4):
            folder = str(tmp_path / f"{number}-{workers}")
            ranks = spawn(workers, train_in_group, url, folder, [*overrides, *canonical])
            assert all(rank == ranks[0] for rank in ranks)
            found.append((ranks[0]["metrics"], digest(folder)))
            assert json.dumps(evaluated(folder)[-1]["protocol"])
        assert found[0] == found[1] == found[2]


def test_a_resumed_run_ends_as_an_uninterrupted_one(alone, translation, vocoder, tmp_path):
    for number, (kind, overrides) in enumerate([(translation, TRANSLATION), (vocoder, VOCODER)]):
        url, uninterrupted, *_ = kind
        folder, calls = Store(str(tmp_path / str(number))), itertools.count()
        config = load_config("digits", [f"data.url='{url}'", *overrides])
        outcome = run(config, alone, folder, should_stop=lambda calls=calls: next(calls) == 2)
        assert outcome["status"] == "interrupted"
        assert 0 < outcome["samples_seen"] < config.run.total_samples
        assert run(config, alone, folder)["status"] == "finished"
        assert digest(folder.url) == digest(uninterrupted)


def test_sample_names_apply(translation, capsys, tmp_path):
    _, run_dir, _, _ = translation
    code = main(["sample", run_dir, "--num", "2", "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert code != 0
    assert "game.task" in message
    assert "gatdist apply" in message
    assert not (tmp_path / "out").exists()


def test_without_held_out_samples_the_run_says_so(alone, translation, tmp_path):
    overrides = [*TRANSLATION, "data.held_out=0.0", "run.total_samples=12"]
    _, events = train(alone, translation[0], str(tmp_path / "run"), overrides)
    notes = [fields["message"] for kind, fields in events if kind == "note"]
    assert any("data.held_out" in note and "evaluate.url" in note for note in notes)
    (log,) = evaluated(str(tmp_path / "run"))
    assert log["protocol"]["split"] == "training data"


def test_separate_data_is_measured(alone, translation, tmp_path):
    other = write_pairs(tmp_path / "other", 9, seed=5)
    overrides = [
        *TRANSLATION,
        "data.held_out=0.0",
        "run.total_samples=12",
        f"evaluate.url='{other}'",
    ]
    train(alone, translation[0], str(tmp_path / "run"), overrides)
    (log,) = evaluated(str(tmp_path / "run"))
    assert log["protocol"]["split"] == "separate data"
    assert log["protocol"]["num_real"] == 9
    again = gatdist.evaluate(str(tmp_path / "run"), overrides=[f"evaluate.url='{other}'"])
    assert again["protocol"]["split"] == "separate data"


def test_separate_data_of_another_format_is_refused(translation, vocoder, tmp_path):
    config = load_config(
        "digits",
        [
            f"data.url='{translation[0]}'",
            *TRANSLATION,
            "data.held_out=0.0",
            f"evaluate.url='{vocoder[0]}'",
        ],
    )
    with pytest.raises(DataError) as caught:
        check(config, str(tmp_path / "run"))
    assert caught.value.subject == "evaluate.url"


def test_a_metric_of_another_modality_is_refused_before_training(translation, tmp_path):
    config = load_config(
        "digits",
        [
            f"data.url='{translation[0]}'",
            *TRANSLATION,
            'evaluate.metrics=["stft"]',
            "run.keep_best_checkpoints=0",
        ],
    )
    with pytest.raises(ConfigError) as caught:
        check(config, str(tmp_path / "run"))
    assert caught.value.subject == "evaluate.metrics"
    assert "stft" in str(caught.value)


class Previewed(Task):
    """Shows a column of another shape than its options say."""

    target = "target"

    def __init__(self, *, shown: str = "all"):
        self.chosen = shown

    def inputs(self, fields):
        return (fields["input"],)

    def preview(self, real, fake):
        columns = {
            "all": super().preview(real, fake),
            "sum": {"sum": fake["target"].sum(1)},
            "channels": {"both": torch.cat([fake["target"], real["input"]], 1)},
            "fewer": {"first": fake["target"][:1]},
            "none": list(fake.values()),
        }
        return columns[self.chosen]


@pytest.mark.parametrize("shown", ["sum", "channels", "fewer", "none"])
def test_a_preview_that_can_not_be_shown_is_refused(shown):
    metadata = {"modality": "image", "fields": {"input": (1, SIDE, SIDE)}}
    examine_task("own", Previewed(), (3, SIDE, SIDE), metadata)
    with pytest.raises(PluginError) as caught:
        examine_task("own", Previewed(shown=shown), (3, SIDE, SIDE), metadata)
    assert "preview()" in str(caught.value)


def test_convergence_of_a_metric_whose_higher_values_are_better():
    settings = ConvergenceConfig(metric="psnr", patience_samples=200, min_improvement=0.1)
    convergence = Convergence(settings, higher_is_better=True)
    for samples, value in ((100, 10.0), (200, 12.0), (300, 12.5)):
        assert convergence.update(samples, {"psnr": value}) is None
    assert convergence.update(400, {"psnr": 5.0})
    assert convergence.best == 12.0


def test_the_best_checkpoints_are_the_highest():
    metrics = {Name(i): {"psnr": value} for i, value in enumerate((20.0, 30.0, 10.0))}
    kept = Retention(newest=1, best=1, metric="psnr", higher_is_better=True).kept(metrics)
    assert kept == {Name(1), Name(2)}
