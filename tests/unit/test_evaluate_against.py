"""Statistics in files, and evaluation against other data, of runs and of generated samples."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import gatdist
from gatdist.cli import main
from gatdist.common.errors import CheckpointError, ConfigError, DataError, StorageError
from gatdist.config import load_config
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import write_dataset
from gatdist.evaluation import classifier
from gatdist.evaluation.distances import Gaussian
from gatdist.evaluation.evaluator import evenly
from gatdist.evaluation.statistics import Statistics, read_statistics
from gatdist.storage import Store
from small_runs import AUDIO, RUN, TEXT, small_config, write_clips, write_texts
from support import refused

POINTS = ("evaluate.features=points",)
SIDE, CLASSES, COUNT = 8, 3, 90


def pixels() -> np.ndarray:
    """Images of a few colours with noise, uint8 [n, 8, 8, 3]; the class is the number modulo 3."""
    rng = np.random.default_rng(0)
    base = rng.integers(40, 200, (CLASSES, 1, 1, 3))
    noise = rng.integers(-30, 30, (COUNT, SIDE, SIDE, 3))
    return (base[np.arange(COUNT) % CLASSES] + noise).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as shards, as a folder, as folders by class, and as a zip."""
    root = tmp_path_factory.mktemp("data")
    files = [encode_png(image) for image in pixels()]
    samples = ({"png": f, "cls": b"%d" % (i % CLASSES)} for i, f in enumerate(files))
    write_dataset(
        Store(str(root / "shards")),
        [((f"{i:03d}", sample) for i, sample in enumerate(samples))],
        modality="image",
        sample_shape=(3, SIDE, SIDE),
        num_classes=CLASSES,
    )
    for i, file in enumerate(files):
        for path in (root / f"folder/{i:03d}.png", root / f"classes/{i % CLASSES}/{i:03d}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
    shutil.make_archive(str(root / "zipped"), "zip", root / "folder")
    return root


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    folder = data / "run"
    settings = [
        *(f"run.{key}={value}" for key, value in RUN.items()),
        f"data.url={json.dumps(str(data / 'shards'))}",
        "model.latent_size=8",
        "model.conditional=true",
        *(f"model.{name}={{name='residual', width=8}}" for name in ("generator", "discriminator")),
        *('evaluate.metrics=["fid", "kid"]', "evaluate.every_samples=0"),
        *("evaluate.features=points", "game.penalties={}"),
    ]
    gatdist.train(load_config("digits", settings), folder, local=True)
    return folder


def evaluate(run: Path | str, against: Path | str | None = None, **more: Any) -> dict[str, Any]:
    more = {"overrides": POINTS} | more
    return gatdist.evaluate(run, against=against, **more)


@given(st.integers(1, 500), st.integers(0, 10**12))
def test_samples_are_chosen_once_and_from_the_whole_data(count: int, more: int) -> None:
    numbers = evenly(torch.arange(count), count, count + more)
    assert (numbers.diff() > 0).all()
    assert numbers[0] == 0
    assert numbers[-1] < count + more
    runs = -(-count // 64)
    assert numbers[-1] >= (count + more) * (1 - 1 / runs) - runs


class TestRuns:
    def test_the_same_data_in_any_form_gives_the_same_distances(
        self, run: Path, data: Path
    ) -> None:
        own = evaluate(run)
        assert own["protocol"]["features"] == "points"
        for form in ("shards", "folder", "classes", "zipped.zip"):
            found = evaluate(run, data / form)
            for name in ("fid", "kid"):  # halves of real samples depend on their order
                assert found["metrics"][name] == pytest.approx(own["metrics"][name], rel=1e-6), form
            assert found["protocol"]["num_real"] == COUNT
            assert found["against"] == str(data / form)
            assert found["samples_seen"] == own["samples_seen"]
        assert evaluate(run, data / "shards")["protocol"] == own["protocol"]
        # The order of a folder's files is not that of the shards.
        assert found["protocol"]["data"] != own["protocol"]["data"]

    def test_some_real_samples_from_all_over_the_data_are_enough(
        self, run: Path, data: Path, tmp_path: Path
    ) -> None:
        chosen = evenly(torch.arange(40), 40, COUNT).tolist()
        for i in chosen:
            (tmp_path / f"{i:03d}.png").write_bytes(encode_png(pixels()[i]))
        overrides = (*POINTS, "evaluate.num_real=40")
        found = evaluate(run, data / "shards", overrides=overrides)
        assert found["metrics"]["fid"] == pytest.approx(evaluate(run, tmp_path)["metrics"]["fid"])
        protocol = found["protocol"]
        assert (protocol["num_real"], protocol["num_generated"]) == (40, 40)
        # Again, with cached features.
        assert evaluate(run, data / "shards", overrides=overrides)["metrics"] == found["metrics"]

    def test_statistics_give_the_same_fid(self, run: Path, data: Path, tmp_path: Path) -> None:
        file = tmp_path / "real.npz"
        saved = gatdist.statistics(data / "shards", file, overrides=POINTS)
        own, found = evaluate(run), evaluate(run, file)
        assert list(found["metrics"]) == ["fid"]
        assert found["metrics"]["fid"] == pytest.approx(own["metrics"]["fid"], rel=1e-9)
        assert found["num_samples"] == COUNT  # as many as there are real samples, by the file
        for key in ("features", "resize", "data", "num_real", "num_generated", "rounding", "fid"):
            assert found["protocol"][key] == own["protocol"][key]
        assert found["protocol"]["data"] == saved["protocol"]["data"]
        assert len(found["protocol"]["statistics"]) == 64

    def test_other_data_gives_another_distance(self, run: Path, data: Path, tmp_path: Path) -> None:
        for path in (data / "folder").iterdir():
            image = 255 - pixels()[int(path.stem)]
            (tmp_path / path.name).write_bytes(encode_png(image))
        assert evaluate(run, tmp_path)["metrics"]["fid"] > 1.1 * evaluate(run)["metrics"]["fid"]

    def test_the_classifier_is_trained_on_the_data_to_compare_with(
        self, run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(classifier, "_NUM_STEPS", 20)
        metrics = ["fid", "label_accuracy", "fid_per_class", "inception_score", "modes", "kl"]
        overrides = ("evaluate.features=classifier",)
        found = evaluate(run, data / "classes", metrics=metrics, overrides=overrides)
        assert {"fid", "fid_per_class", "label_accuracy", "inception_score_std"} <= set(
            found["metrics"]
        )
        assert found["protocol"]["recipe"] == "classifier-v1"

    def test_data_of_another_size_is_rejected_unless_it_is_resized(
        self, run: Path, tmp_path: Path
    ) -> None:
        for i, image in enumerate(pixels()):
            large = np.repeat(np.repeat(image, 2, axis=0), 2, axis=1)
            (tmp_path / f"{i:03d}.png").write_bytes(encode_png(large))
        with refused(DataError, str(tmp_path)):
            evaluate(run, tmp_path)
        resized = ("data.resolution=8", "data.resize=box", *POINTS)
        found = evaluate(run, tmp_path, overrides=resized)
        assert found["metrics"]["fid"] == pytest.approx(evaluate(run)["metrics"]["fid"], rel=1e-6)
        assert found["protocol"]["data_resize"] == "box"

    def test_untrusted_run_is_compared_with_data_that_the_user_names(
        self, run: Path, data: Path, tmp_path: Path
    ) -> None:
        theirs = tmp_path / "theirs"
        shutil.copytree(run, theirs)
        config = json.loads((theirs / "config.json").read_text())
        config["data"] |= {"url": "s3://elsewhere/data", "storage_options": {"key": "x"}}
        (theirs / "config.json").write_text(json.dumps(config))
        with refused(ConfigError):
            evaluate(theirs)
        assert evaluate(theirs, data / "shards")["metrics"] == evaluate(run)["metrics"]

    def test_data_named_twice_is_that_of_against(self, run: Path, data: Path) -> None:
        overrides = ("data.url=s3://elsewhere/data", *POINTS)
        for samples in (run, data / "folder"):
            found = evaluate(samples, data / "shards", overrides=overrides)
            assert found["protocol"]["num_real"] == COUNT

    @pytest.mark.parametrize("key", ["data=5", "data.urls=x"])
    def test_wrong_keys_are_refused(self, run: Path, data: Path, key: str) -> None:
        for samples in (run, data / "folder"):
            with pytest.raises(ConfigError):
                evaluate(samples, data / "shards", overrides=(key,))

    def test_keys_of_training_are_refused_for_samples(self, data: Path) -> None:
        with pytest.raises(ConfigError):
            evaluate(data / "folder", data / "shards", overrides=("run.seed=1",))

    def test_data_of_other_classes_is_unlabelled(
        self, run: Path, data: Path, tmp_path: Path
    ) -> None:
        for path in (data / "folder").iterdir():
            (tmp_path / "ab"[int(path.stem) % 2]).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "ab"[int(path.stem) % 2])
        assert evaluate(run, tmp_path)["metrics"].keys() >= {"fid"}
        with refused(ConfigError, "evaluate.metrics"):
            evaluate(run, tmp_path, metrics=["fid_per_class"])

    def test_paths_may_be_relative(
        self, run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(data)
        expected = evaluate(run)["metrics"]
        assert evaluate("run", "shards")["metrics"] == expected
        assert evaluate("run", overrides=("data.url=shards", *POINTS))["metrics"] == expected


class TestGeneratedSamples:
    def test_samples_in_files_score_as_the_run_that_generated_them(
        self, run: Path, data: Path, tmp_path: Path
    ) -> None:
        gatdist.sample(run, COUNT, out=tmp_path / "files", seed=5)
        gatdist.sample(run, COUNT, out=tmp_path / "shards", seed=5, shards=True)
        shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "files")
        trained = gatdist.load(run)
        assert trained is not None
        expected = self.of_sampler(run, 5)
        for form in ("files", "shards", "zipped.zip"):
            found = evaluate(tmp_path / form, data / "shards")
            assert found["metrics"] == pytest.approx(expected, rel=1e-6, abs=1e-9), form
            assert found["num_samples"] == COUNT
            assert "samples_seen" not in found

    @staticmethod
    def of_sampler(run: Path, seed: int) -> dict[str, float]:
        """Measure the generator itself, with the latents of `gatdist sample`."""
        from gatdist.config import EvaluateConfig
        from gatdist.evaluation import Evaluator
        from gatdist.parallel.communicator import LocalCommunicator
        from gatdist.runs import load_run

        device = torch.device("cpu")
        trained = load_run(Store(str(run)), device)
        dataset = open_dataset(trained.config.data)
        config = EvaluateConfig(features="points")
        evaluator = Evaluator(config, dataset, LocalCommunicator(device), device)
        return evaluator(trained.sampler(seed, "sample")).metrics

    def test_classes_of_shards_and_folders_are_those_to_generate(
        self, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(classifier, "_NUM_STEPS", 60)
        metrics = ["label_accuracy", "fid_per_class"]
        overrides = ("evaluate.features=classifier",)
        gatdist.sample(run, COUNT, out=tmp_path / "fakes", shards=True)
        for samples in (tmp_path / "fakes", data / "classes", data / "shards"):
            found = evaluate(samples, data / "shards", metrics=metrics, overrides=overrides)
            assert {"label_accuracy", "fid_class_2"} <= found["metrics"].keys()
        assert found["metrics"]["fid_per_class"] == pytest.approx(0, abs=1e-5)
        assert found["metrics"]["label_accuracy"] > 0.9
        with refused(ConfigError, "evaluate.metrics"):
            evaluate(data / "folder", data / "shards", metrics=metrics, overrides=overrides)

    def test_folders_of_other_classes_are_unlabelled(self, data: Path, tmp_path: Path) -> None:
        for i, image in enumerate(pixels()):
            path = tmp_path / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_png(image))
        with refused(ConfigError, "evaluate.metrics"):
            evaluate(tmp_path, data / "shards", metrics=["fid_per_class"])

    def test_some_of_the_samples_are_measured_on_request_and_no_more_than_there_are(
        self, data: Path
    ) -> None:
        found = evaluate(data / "folder", data / "shards", num=40)
        assert found["num_samples"] == found["protocol"]["num_generated"] == 40
        with refused(ConfigError, "evaluate.num_samples"):
            evaluate(data / "folder", data / "shards", num=COUNT + 1)

    def test_real_samples_are_at_distance_0_from_their_statistics(
        self, data: Path, tmp_path: Path
    ) -> None:
        gatdist.statistics(data / "zipped.zip", tmp_path / "real.npz", overrides=POINTS)
        found = evaluate(data / "folder", tmp_path / "real.npz")
        assert found["metrics"] == {"fid": pytest.approx(0, abs=1e-3)}

    def test_audio_and_texts_are_scored_too(self, tmp_path: Path) -> None:
        write_clips(tmp_path / "sound")
        config = small_config(tmp_path / "sound", AUDIO)
        gatdist.train(
            config.model_copy(
                update={"evaluate": config.evaluate.model_copy(update={"metrics": []})}
            ),
            tmp_path / "audio",
            local=True,
        )
        gatdist.sample(tmp_path / "audio", 20, out=tmp_path / "clips")
        asked = {"overrides": ("evaluate.features=log_mel",)}
        found = evaluate(tmp_path / "clips", tmp_path / "sound", **asked)
        assert found["metrics"]["fid"] > 0
        gatdist.statistics(tmp_path / "sound", tmp_path / "sound.npz", **asked)
        again = evaluate(tmp_path / "clips", tmp_path / "sound.npz", **asked)
        assert again["metrics"]["fid"] == pytest.approx(found["metrics"]["fid"], rel=1e-9)
        write_texts(tmp_path / "words")
        for i, word in enumerate(("abba", "cab", "ca", "aaaaaa")):
            path = tmp_path / "texts" / f"{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(word)
        measured = evaluate(
            tmp_path / "texts",
            tmp_path / "words",
            metrics=TEXT["evaluate"]["metrics"],
            overrides=('data.vocabulary="abc"',),
        )
        assert measured["metrics"]["copies"] == 0.5

    def test_folder_without_reference_data_is_rejected(self, data: Path) -> None:
        with refused(CheckpointError, str(data / "folder")):
            evaluate(data / "folder")

    def test_a_damaged_file_is_named(self, data: Path, tmp_path: Path) -> None:
        shutil.copytree(data / "folder", tmp_path / "some")
        (tmp_path / "some/007.png").write_bytes(b"not an image")
        with pytest.raises(DataError, match=r"007\.png"):
            evaluate(tmp_path / "some", data / "shards")

    def test_images_of_several_sizes_are_rejected_with_the_command_that_resizes_them(
        self, data: Path, tmp_path: Path
    ) -> None:
        for i in range(6):
            content = encode_png(np.zeros((8 + i, 8, 3), dtype=np.uint8))
            (tmp_path / f"{i}.png").write_bytes(content)
        with pytest.raises(DataError, match="gatdist pack"):
            evaluate(tmp_path, data / "shards")

    @pytest.mark.parametrize("against", ["nowhere", "nowhere.npz", "empty"])
    def test_missing_data_is_rejected(self, data: Path, tmp_path: Path, against: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises((StorageError, DataError)):
            evaluate(data / "folder", tmp_path / against)

    def test_metrics_that_need_a_discriminator_are_rejected(self, data: Path) -> None:
        with refused(ConfigError, "evaluate.metrics"):
            evaluate(data / "folder", data / "shards", metrics=["probe"])


class TestStatistics:
    @staticmethod
    def some(d: int = 5) -> Statistics:
        x = np.random.default_rng(0).normal(size=(50, d))
        fit = Gaussian(torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x, rowvar=False)))
        return Statistics(fit, {"features": "points", "num_real": 50})

    def test_written_statistics_are_read_back_bit_for_bit(self, tmp_path: Path) -> None:
        some = self.some()
        (tmp_path / "s.npz").write_bytes(some.encode())
        found = read_statistics(str(tmp_path / "s.npz"))
        assert torch.equal(found.fit.mean, some.fit.mean)
        assert torch.equal(found.fit.covariance, some.fit.covariance)
        assert found.protocol == some.protocol
        assert some.encode() == self.some().encode()
        with np.load(tmp_path / "s.npz") as theirs:  # as TTUR and pytorch-fid do
            assert np.array_equal(theirs["mu"][:], some.fit.mean.numpy())
            assert np.array_equal(theirs["sigma"][:], some.fit.covariance.numpy())

    @pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4"])
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_files_of_other_programs_are_read(self, tmp_path: Path, dtype: str, save: Any) -> None:
        some = self.some()
        mean, covariance = some.fit.mean.numpy(), some.fit.covariance.numpy()
        more = {"count": np.array([50]), "protocol": np.zeros(3)}
        save(tmp_path / "s.npz", mu=mean.astype(dtype), sigma=covariance.astype(dtype).T, **more)
        found = read_statistics(str(tmp_path / "s.npz"))
        assert found.protocol == {}
        assert torch.allclose(found.fit.mean, some.fit.mean, atol=1e-6)
        assert torch.allclose(found.fit.covariance, some.fit.covariance, atol=1e-6)

    @pytest.mark.parametrize(
        "change",
        [
            {"mu": None},
            {"sigma": None},
            {"mu": np.zeros(4)},
            {"mu": np.zeros((5, 1))},
            {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
            {"sigma": np.zeros((5, 6))},
            {"sigma": np.zeros(25)},
            {"mu": np.array(1.0), "sigma": np.array(1.0)},
            {"mu": np.full(5, np.nan)},
            {"sigma": np.full((5, 5), np.inf)},
            {"mu": np.full(5, 1e200)},
            {"sigma": np.eye(5) * 1e308},
            {"sigma": np.triu(np.ones((5, 5)))},
            {"sigma": -np.eye(5)},
            {"sigma": np.ones((5, 5)) - np.eye(5)},  # symmetric, but no covariance
            {"mu": np.zeros(5, dtype=np.int64)},
            {"mu": np.zeros(5, dtype=np.float16)},
            {"mu": np.zeros(5, dtype=complex)},
            {"mu": np.array(["a"] * 5)},
            {"mu": np.array([None] * 5, dtype=object)},
            {"mu": np.zeros(9000), "sigma": np.zeros((1, 1))},
            {"protocol": np.array("no JSON")},
            {"protocol": np.array("[1]")},
            {"protocol": np.array("x" * 2**16)},
            {"protocol": np.array('{"a": 1')},
        ],
    )
    def test_invalid_mean_and_covariance_are_rejected(
        self, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        arrays = {"mu": np.zeros(5), "sigma": np.eye(5)} | change
        kept = {name: array for name, array in arrays.items() if array is not None}
        np.savez(tmp_path / "s.npz", **kept)
        with refused(DataError, str(tmp_path / "s.npz")):
            read_statistics(str(tmp_path / "s.npz"))

    def test_metadata_of_a_file_is_used_only_if_valid(self, tmp_path: Path) -> None:
        wrong = {"data": "\x1b[2J", "num_real": -3, "features": "points"}
        some = Statistics(self.some().fit, wrong)
        (tmp_path / "s.npz").write_bytes(some.encode())
        assert read_statistics(str(tmp_path / "s.npz")).of_data == {}

    def test_damaged_files_are_rejected(self, tmp_path: Path) -> None:
        whole = self.some().encode()
        rng = np.random.default_rng(0)
        variants = [b"", b"PK", b"no zip", whole[:-30], whole[:200], whole[100:]]
        for _ in range(60):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                broken[place] = rng.integers(256)
            variants.append(bytes(broken))
        for number, content in enumerate(variants):
            path = tmp_path / f"{number}.npz"
            path.write_bytes(content)
            try:
                found = read_statistics(str(path))
            except DataError:
                continue
            assert len(found.fit.mean) == 5  # the damage is in bytes that mean nothing

    def test_decompression_bomb_is_not_decompressed(self, tmp_path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f8", "fortran_order": False, "shape": (2**30,)}
        )
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("mu.npy", "w", force_zip64=True) as member:
                member.write(header.getvalue())
                for _ in range(600):
                    member.write(bytes(2**20))
            archive.writestr("sigma.npy", b"")
        (tmp_path / "s.npz").write_bytes(file.getvalue())
        with refused(DataError, str(tmp_path / "s.npz")):
            read_statistics(str(tmp_path / "s.npz"))

    def test_duplicate_arrays_are_rejected(self, tmp_path: Path) -> None:
        path = tmp_path / "s.npz"
        path.write_bytes(self.some().encode())
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("mu.npy", b"")
        with refused(DataError, str(path)):
            read_statistics(str(path))

    def test_statistics_of_other_features_are_rejected(self, data: Path, tmp_path: Path) -> None:
        gatdist.statistics(data / "shards", tmp_path / "real.npz", overrides=POINTS)
        with np.load(tmp_path / "real.npz") as file:
            arrays = dict(file)
        other = json.dumps(json.loads(str(arrays["protocol"])) | {"features": "others"})
        np.savez(tmp_path / "others.npz", **(arrays | {"protocol": np.array(other)}))
        np.savez(tmp_path / "fewer.npz", mu=np.zeros(5), sigma=np.eye(5))
        for name in ("others.npz", "fewer.npz"):
            with refused(DataError, name):
                evaluate(data / "folder", tmp_path / name)

    def test_files_that_do_not_record_it_need_a_number_of_samples(
        self, run: Path, data: Path, tmp_path: Path
    ) -> None:
        gatdist.statistics(data / "shards", tmp_path / "real.npz", overrides=POINTS)
        with np.load(tmp_path / "real.npz") as file:
            np.savez(tmp_path / "bare.npz", mu=file["mu"], sigma=file["sigma"])
            protocol = np.array(json.dumps({"num_real": 2**47}))
            np.savez(tmp_path / "many.npz", mu=file["mu"], sigma=file["sigma"], protocol=protocol)
        for name in ("bare.npz", "many.npz"):
            with refused(ConfigError, "evaluate.num_samples"):
                evaluate(run, tmp_path / name)
        found = evaluate(run, tmp_path / "bare.npz", num=COUNT)
        assert found["metrics"]["fid"] == pytest.approx(evaluate(run)["metrics"]["fid"], rel=1e-9)
        assert found["protocol"]["num_real"] == "not recorded"

    @pytest.mark.parametrize("metric", ["kid", "precision_recall", "fid_per_class", "probe", "jsd"])
    def test_metrics_that_need_real_samples_are_rejected(
        self, run: Path, data: Path, tmp_path: Path, metric: str
    ) -> None:
        gatdist.statistics(data / "shards", tmp_path / "real.npz", overrides=POINTS)
        with refused(ConfigError, "evaluate.metrics"):
            evaluate(run, tmp_path / "real.npz", metrics=[metric])

    def test_features_that_are_trained_on_the_data_have_no_statistics(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(classifier, "_NUM_STEPS", 2)
        default = ("evaluate.features=classifier",)
        with refused(ConfigError, "evaluate.features"):
            gatdist.statistics(data / "shards", tmp_path / "real.npz", overrides=default)
        assert not (tmp_path / "real.npz").exists()
        gatdist.statistics(data / "shards", tmp_path / "real.npz", overrides=POINTS)
        with refused(ConfigError, "evaluate.features"):
            evaluate(data / "folder", tmp_path / "real.npz", overrides=default)


class TestCommands:
    def test_statistics_and_evaluate_print_the_protocol(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, sets = str(tmp_path / "real"), ["--set", *POINTS]
        assert main(["statistics", str(data / "shards"), "--out", out, *sets]) == 0
        assert f"{out}.npz: 192 features of 90 samples" in capsys.readouterr().out
        words = ["evaluate", str(data / "folder"), "--against", f"{out}.npz", *sets]
        assert main(words) == 0
        text = capsys.readouterr().out
        assert f"90 generated samples, compared with {out}.npz" in text
        rows = [line.split() for line in text.partition("protocol:\n")[2].splitlines()]
        assert ["features", "points"] in rows
        assert ["resize", "none"] in rows
        assert main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["protocol"]["num_generated"] == 90

    @pytest.mark.parametrize(
        "more",
        [
            ["--against", "NOWHERE"],
            ["--against", "DATA/shards", "--metric", "fod"],
            ["--against", "DATA/shards", "--set", "evaluate.fuatures=x"],
            ["--against", "DATA/shards", "--num", "0"],
            ["--against", ""],
            [],
        ],
    )
    def test_bad_input_ends_with_status_2(
        self, data: Path, more: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [word.replace("DATA", str(data)) for word in more]
        assert main(["evaluate", str(data / "folder"), *words, "--set", *POINTS]) == 2
        assert capsys.readouterr().err.count("\n") == 1
