"""Images, audio and text end to end: training, evaluation, sampling, export."""

import json
import logging
import shutil

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import gatdist
from gatdist.common.errors import CheckpointError, ConfigError, DataError, UserError
from gatdist.config import DataConfig, load_config
from gatdist.data.dataset import open_dataset
from gatdist.evaluation import classifier
from gatdist.models.layers import DiscriminatorFeatures
from gatdist.runs import sampling
from gatdist.storage import Store
from small_runs import AUDIO, LENGTH, RATE, RUN, TEXT, small_config, write_clips, write_texts
from support import refused


@pytest.fixture(scope="module")
def audio_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_clips(folder / "data")
    config = small_config(folder / "data", AUDIO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_NUM_STEPS", 20)
        outcome = gatdist.train(config, str(folder / "run"), local=True)
    assert outcome["status"] == "finished"
    return folder / "run"


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_texts(folder / "data")
    config = small_config(folder / "data", TEXT, vocabulary="abc")
    outcome = gatdist.train(config, str(folder / "run"), local=True)
    assert outcome["status"] == "finished"
    return folder / "run"


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """StyleGAN2: with a mapping network, its own noise, and classes."""
    folder = tmp_path_factory.mktemp("image") / "run"
    small = "capacity=64, max_width=8"
    settings = [
        *(f"run.{key}={value}" for key, value in RUN.items()),
        f"model.generator={{name='stylegan2', {small}, style_size=8, mapping_layers=2}}",
        f"model.discriminator={{name='stylegan2', {small}}}",
        "model.latent_size=8",
        "model.conditional=true",
        "game.penalties={r1={strength=1.0}, path_length={strength=1.0, every_steps=4}}",
        "evaluate.metrics=[]",
        "evaluate.every_samples=0",
    ]
    gatdist.train(load_config("digits", settings), str(folder), local=True)
    return folder


def metrics_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image, dtype=float)


def test_run_on_audio_logs_audio_and_its_metrics(audio_run):
    clip, rate = soundfile.read(audio_run / "samples" / "fakes-000000096.wav")
    assert (rate, len(clip)) == (RATE, 16 * (LENGTH + RATE // 4))
    assert pixels_of(audio_run / "samples" / "fakes-000000096.png").size
    assert (audio_run / "samples" / "reals.wav").exists()
    found = metrics_of(audio_run)
    for name in ("fid", "label_accuracy", "probe", "probe_raw"):
        assert np.isfinite(found[f"metric/{name}"])
    assert 0 < found["time/evaluation_s"] < 60


def test_run_on_texts_logs_texts_and_their_metrics(text_run):
    reals = (text_run / "samples" / "reals.txt").read_text().splitlines()
    assert set(reals) == {"abba", "baab", "cab", "abc", "caba", "bac"}
    fakes = (text_run / "samples" / "fakes-000000096.txt").read_text().split("\n")
    assert set("".join(fakes)) <= set("abc")
    found = metrics_of(text_run)
    assert 0 < found["metric/jsd"] <= 1
    assert found["metric/jsd_real_split"] < 0.1


@pytest.mark.parametrize("run", ["audio_run", "text_run", "image_run"])
def test_samples_of_a_seed_do_not_depend_on_their_number(run, request, tmp_path):
    run = request.getfixturevalue(run)
    few = gatdist.sample(str(run), 3, out=str(tmp_path / "few"))
    gatdist.sample(str(run), 5, out=str(tmp_path / "many"))
    assert len(few) == 3
    for path in few:
        name = path.rsplit("/", 1)[1]
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_classes_are_selected_by_number_or_name(audio_run, tmp_path):
    both = [
        gatdist.sample(str(audio_run), 2, out=str(tmp_path / str(i)), labels=labels)
        for i, labels in enumerate((["high", "low"], ["2", "0"], ["low"]))
    ]
    first, second, third = ([(tmp_path / path).read_bytes() for path in paths] for paths in both)
    assert first == second
    assert first[1] == third[1]
    assert first[0] != third[0]
    with refused(ConfigError, "--labels"):
        gatdist.sample(str(audio_run), 1, out=str(tmp_path), labels=["hihg"])


def test_classes_of_an_unconditional_generator_are_rejected(text_run, tmp_path):
    with refused(ConfigError, "--labels"):
        gatdist.sample(str(text_run), 1, out=str(tmp_path), labels=["0"])


def test_truncation_makes_samples_similar(image_run, audio_run):
    for run in (image_run, audio_run):
        from gatdist.runs import load_run

        trained = load_run(Store(str(run)), torch.device("cpu"))
        labels = torch.zeros(64, dtype=torch.int64)
        spread = [
            float(trained.sampler(0, "s", truncation)(torch.arange(64), labels).std(dim=0).mean())
            for truncation in (0.1, 0.5, None)
        ]
        assert spread == sorted(spread)
        assert spread[0] < 0.6 * spread[2]


def test_truncated_latents_have_the_truncated_distribution():
    from gatdist.runs.trained import _cut_off

    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    cut = _cut_off(z, 1.0)
    inside = z[z.abs() <= 1]
    assert cut.abs().max() <= 1
    places = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(cut.quantile(places), inside.quantile(places), atol=0.02, rtol=0)


def test_walk_interpolates_from_sample_to_sample(image_run, tmp_path):
    args = {"labels": ["3"], "seed": 5}
    ends = gatdist.sample(str(image_run), 2, out=str(tmp_path / "ends"), **args)
    way = gatdist.sample(str(image_run), 2, out=str(tmp_path / "way"), interpolate=4, **args)
    assert len(way) == 8
    pixels = [pixels_of(path) for path in way]
    first = pixels_of(ends[0])
    assert abs(pixels[0] - first).max() <= 1
    animation = gatdist.sample(
        str(image_run), 2, out=str(tmp_path / "walk.gif"), interpolate=4, **args
    )
    assert animation == [str(tmp_path / "walk.gif")]
    with Image.open(tmp_path / "walk.gif") as moving:
        assert moving.n_frames > 1


def test_one_file_by_extension_contains_all_samples(audio_run, text_run, tmp_path):
    for name, run in (("a.wav", audio_run), ("a.png", audio_run), ("a.txt", text_run)):
        [path] = gatdist.sample(str(run), 4, out=str(tmp_path / name), grid=True)
        assert path == str(tmp_path / name)
    assert len((tmp_path / "a.txt").read_text().splitlines()) == 4
    [path] = gatdist.sample(str(audio_run), 2, out=str(tmp_path / "all"), grid=True)
    assert path.endswith("all.wav")


def test_long_walk_in_chunks_is_continuous(image_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 3)
    args = {"labels": ["3"], "interpolate": 8}
    few = gatdist.sample(str(image_run), 2, out=str(tmp_path / "few"), **args)
    monkeypatch.undo()
    many = gatdist.sample(str(image_run), 2, out=str(tmp_path / "many"), **args)
    assert [path.rpartition("/")[2] for path in few] == [f"{i:06d}.png" for i in range(16)]
    for one, other in zip(few, many, strict=True):
        assert abs(pixels_of(one) - pixels_of(other)).max() <= 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"grid": True, "shards": True}, "--grid"),
        ({"shards": True, "out": "RUN"}, "RUN"),
        ({"grid": True, "num": 10**9}, "--num"),
        ({"out": "walk.gif", "interpolate": 10**9}, "--interpolate"),
        ({"out": ""}, "path or URL"),
    ],
)
def test_invalid_samples_are_rejected(options, field, image_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = {"num": 2, "out": "here"} | options
    here["out"] = here["out"].replace("RUN", str(image_run))
    with refused(UserError, field.replace("RUN", str(image_run))):
        gatdist.sample(str(image_run), **here)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", ["audio_run", "text_run", "image_run"])
def test_exported_generator_gives_the_same_samples(run, request, tmp_path):
    run = request.getfixturevalue(run)
    from gatdist.runs import load_run
    from gatdist.runs.export import Exported

    trained = load_run(Store(str(run)), torch.device("cpu"))
    path = gatdist.export(str(run), "safetensors", out=str(tmp_path / "g"))
    assert path == str(tmp_path / "g.safetensors")
    loaded = gatdist.load(path)
    for (name, mine), (other, theirs) in zip(
        loaded.state_dict().items(), gatdist.load(str(run)).state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)
    program = torch.export.load(gatdist.export(str(run), "torch", out=str(tmp_path / "g")))
    exported = Exported(trained)
    exported.require_equal(lambda inputs: program.module()(**inputs))
    assert len(exported.inputs(torch.arange(3), seed=0)) >= 1


@pytest.mark.parametrize("run", ["audio_run", "text_run", "image_run"])
def test_onnx_model_gives_the_same_samples(run, request, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = request.getfixturevalue(run)
    from gatdist.runs import load_run
    from gatdist.runs.export import Exported

    path = gatdist.export(str(run), "onnx", out=str(tmp_path / "g.onnx"))
    trained = load_run(Store(str(run)), torch.device("cpu"))
    sampler = trained.sampler(1, "sample")
    positions = torch.arange(7)
    inputs = {name: t.numpy() for name, t in Exported(trained).inputs(positions, seed=1).items()}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [samples] = session.run(None, inputs)
    assert abs(samples - sampler(positions).numpy()).max() < 1e-4


def test_export_prints_nothing_of_torchs_exporter(text_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    records = []
    monkeypatch.setattr(logging.getLogger("torch.onnx"), "handlers", [handler := logging.Handler()])
    handler.emit = records.append
    gatdist.export(str(text_run), "onnx", out=str(tmp_path / "g.onnx"))
    assert [record.getMessage() for record in records] == []


def test_unknown_format_is_rejected(text_run, tmp_path):
    with refused(ConfigError, "--format"):
        gatdist.export(str(text_run), "onxx", out=str(tmp_path / "g"))


def header(values):
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\0\0\0\0\0\0\0 not a header    ",
        b"\xff" * 8 + b"{}",
        b"\x00\0\0\0\0\0\0\x80" + b"{" * 100,
        header({"__metadata__": {"gatdist": "[]"}}),
        header({"__metadata__": {"gatdist": "{}"}}),
        header({"__metadata__": {"gatdist": json.dumps({"config": {}, "samples": {}})}}),
        header({"__metadata__": 3}),
        header([]),
        b"\x20\xa1\x07\0\0\0\0\0" + b"[" * 500_000,
    ],
)
def test_file_that_is_no_export_is_rejected(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with refused(CheckpointError, "x.safetensors"):
        gatdist.load(str(tmp_path / "x.safetensors"))


def test_features_of_a_discriminator_are_a_module(audio_run):
    discriminator = gatdist.load(str(audio_run), "discriminator")
    features = DiscriminatorFeatures(discriminator)
    found = features(torch.randn(3, 1, LENGTH))
    assert found.shape == (3, discriminator.finish.in_features)
    features.close()


class TestStartingFromAnotherRun:
    def config(self, data, run, **model):
        values = {**AUDIO, "model": AUDIO["model"] | {"init_from": str(run)} | model}
        return small_config(data, values)

    def test_weights_are_those_of_the_other_run(self, audio_run, tmp_path):
        from gatdist.parallel.communicator import LocalCommunicator
        from gatdist.training.state import TrainState

        config = self.config(audio_run.parent / "data", audio_run)
        metadata = {"sample_rate": RATE}
        state = TrainState(config, LocalCommunicator(torch.device("cpu")), (1, LENGTH), 3, metadata)
        state.start_from_another_run(config, str(tmp_path))
        expected = gatdist.load(str(audio_run)).network.state_dict()
        for network in (state.players["generator"].bare, state.average.network):
            assert all(torch.equal(t, expected[name]) for name, t in network.state_dict().items())
        outcome = gatdist.train(config, str(tmp_path / "run"), local=True)
        assert outcome["samples_seen"] == RUN["total_samples"]

    def test_other_networks_are_rejected_by_the_first_tensor(self, audio_run, tmp_path):
        wider = {"generator": {"name": "wavegan", "width": 8}}
        config = self.config(audio_run.parent / "data", audio_run, **wider)
        with refused(CheckpointError, "run: tensor average/layers.0.bias"):
            gatdist.train(config, str(tmp_path / "run"), local=True)

    def test_unless_strict_only_tensors_of_another_shape_are_initialized(self, audio_run, tmp_path):
        from gatdist.parallel.communicator import LocalCommunicator
        from gatdist.training.state import TrainState

        longer = 4 * LENGTH
        config = self.config(audio_run.parent / "data", audio_run, init_from_strict=False)
        metadata = {"sample_rate": RATE}
        state = TrainState(config, LocalCommunicator(torch.device("cpu")), (1, longer), 3, metadata)
        fresh = {k: t.clone() for k, t in state.players["generator"].bare.state_dict().items()}
        state.start_from_another_run(config, str(tmp_path))
        theirs = gatdist.load(str(audio_run)).network.state_dict()
        copied = 0
        for name, tensor in state.players["generator"].bare.state_dict().items():
            same = name in theirs and theirs[name].shape == tensor.shape
            copied += same
            assert torch.equal(tensor, theirs[name] if same else fresh[name]), name
        assert 0 < copied < len(fresh)

    def test_a_run_resumes_without_the_other_run(self, audio_run, tmp_path):
        other, folder = tmp_path / "other", str(tmp_path / "run")
        shutil.copytree(audio_run, other)
        config = self.config(audio_run.parent / "data", other)
        gatdist.train(config, folder, local=True)
        shutil.rmtree(other)
        shutil.rmtree(max((tmp_path / "run/checkpoints").iterdir()))
        outcome = gatdist.train(config, folder, local=True)
        assert outcome["samples_seen"] == RUN["total_samples"]

    def test_missing_run_is_rejected(self, audio_run, tmp_path):
        config = self.config(audio_run.parent / "data", tmp_path / "nothing")
        with refused(ConfigError, "model.init_from"):
            gatdist.train(config, str(tmp_path / "run"), local=True)


class TestBadInput:
    def test_text_outside_of_the_vocabulary_is_named(self, text_run, tmp_path):
        config = small_config(text_run.parent / "data", TEXT, vocabulary="ab")
        with refused(DataError, "shard-000000.tar"):
            gatdist.train(config, str(tmp_path / "run"), local=True)

    def test_clips_shorter_than_configured_are_rejected(self, audio_run, tmp_path):
        config = small_config(audio_run.parent / "data", AUDIO, length=1024)
        with refused(DataError, "data.length"):
            gatdist.train(config, str(tmp_path / "run"), local=True)

    def test_networks_of_another_modality_are_rejected(self, audio_run, tmp_path):
        values = {**TEXT, "evaluate": {"metrics": []}}
        config = small_config(audio_run.parent / "data", values)
        with refused(ConfigError, "model.generator.name"):
            gatdist.train(config, str(tmp_path / "run"), local=True)

    def test_image_metric_is_rejected_for_texts(self, text_run, tmp_path):
        values = {**TEXT, "evaluate": {"metrics": ["fid"]}}
        config = small_config(text_run.parent / "data", values, vocabulary="abc")
        with refused(DataError, "evaluate.features"):
            gatdist.train(config, str(tmp_path / "run"), local=True)

    @pytest.mark.parametrize(
        ("vocabulary", "rule"), [("aa", "each character once"), ("", "1 to 255 characters")]
    )
    def test_invalid_vocabulary_is_rejected(self, vocabulary, rule):
        with refused(ConfigError, "data.vocabulary"):
            small_config("x", TEXT, vocabulary=vocabulary)


def test_wav_bytes_contain_the_sample(audio_run, tmp_path):
    [path] = gatdist.sample(str(audio_run), 1, out=str(tmp_path))
    clip, rate = soundfile.read(path)
    assert (rate, clip.shape) == (RATE, (LENGTH,))


def test_shards_of_samples_are_a_data_set_of_the_same_samples(audio_run, tmp_path, monkeypatch):
    monkeypatch.setattr("gatdist.runs.sampling.SHARD_SAMPLES", 256)
    options = {"shards": True, "seed": 3, "labels": ["high", "low", "low"]}
    written = gatdist.sample(str(audio_run), 600, out=str(tmp_path / "two"), workers=2, **options)
    assert written == [str(tmp_path / "two" / f"shard-{i:06d}.tar") for i in range(3)]
    data = open_dataset(DataConfig(url=str(tmp_path / "two")))
    assert (data.num_samples, data.num_classes, data.sample_format.metadata["sample_rate"]) == (
        600,
        3,
        RATE,
    )
    clips, labels = data.read(np.arange(600))
    assert labels.tolist() == [2, 0, 0] * 200
    files = gatdist.sample(str(audio_run), 3, out=str(tmp_path), seed=3, labels=options["labels"])
    for path, clip in zip(files, clips, strict=False):
        found, _ = soundfile.read(path, dtype="float32")
        assert (found == clip[0]).all()
    gatdist.sample(str(audio_run), 600, out=str(tmp_path / "one"), **options)
    assert open_dataset(DataConfig(url=str(tmp_path / "one"))).fingerprint == data.fingerprint
