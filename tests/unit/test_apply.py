"""``gatdist apply``: files to files, by generators with inputs."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import gatdist
from conditional_runs import (
    HOP,
    LENGTH,
    RATE,
    SIDE,
    clip,
    image,
    train_inpainting,
    train_labelled,
    train_translation,
    train_vocoder,
)
from gatdist.cli import main
from gatdist.common.errors import CheckpointError, ConfigError, DataError, StorageError
from gatdist.data.codecs.arrays import encode_array
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.shard_files import write_dataset
from gatdist.packing.entries import Entry, Part, Span
from gatdist.runs.applying import work
from gatdist.runs.applying.files import output_name
from gatdist.storage import Store
from gatdist.storage.local import remove_all
from packing import content, write
from support import refused


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory):
    return train_vocoder(tmp_path_factory.mktemp("vocoder") / "run")


@pytest.fixture(scope="module")
def translation(tmp_path_factory):
    return train_translation(tmp_path_factory.mktemp("translation") / "run")


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    """A generator that sees the whole input, by instance normalization."""
    network = 'model.generator={name="unet", width=4, norm="instance"}'
    return train_translation(tmp_path_factory.mktemp("instance") / "run", network)


@pytest.fixture(scope="module")
def dropout(tmp_path_factory):
    """A generator whose noise is dropout, as there is from 64 pixels on."""
    return train_translation(tmp_path_factory.mktemp("dropout") / "run", "data.resolution=64")


def wav(i, length=LENGTH, rate=RATE):
    return encode_wav(clip(i, length), rate)


def png(i, *size):
    return encode_png(image(i, *size))


def pixels_of(path):
    with Image.open(path) as opened:
        return np.asarray(opened)


def levels_of(path):
    return soundfile.read(path, dtype="int16")[0]


def names_below(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def nothing_to_do(monkeypatch):
    """Fail if anything is generated."""

    def fail(*arguments, **keywords):
        raise AssertionError("generated")

    monkeypatch.setattr(work.Applied, "each", fail)


class TestVocoder:
    def test_recordings_keep_their_names_and_lengths(self, vocoder, tmp_path, nothing_to_do_later):
        files = {
            "a/x.wav": wav(0, 400),
            "a/y.flac.wav": wav(1, 333),
            "fast.wav": wav(2, 800, 2 * RATE),
            "short.wav": wav(3, 9),
            "broken.wav": b"RIFF",
        }
        stereo = np.concatenate([clip(4, 320), clip(5, 320)])
        files["b/stereo.wav"] = encode_wav(stereo, RATE)
        source, out = write(tmp_path / "in", files), tmp_path / "out"
        outcome = gatdist.apply(vocoder, source, out)
        assert (outcome["written"], outcome["found"], outcome["skipped"]) == (5, 0, 1)
        assert names_below(out) == {
            *("a/x.wav", "a/y.flac.wav", "b/stereo.wav", "fast.wav", "short.wav"),
            *("apply.json", "report.jsonl"),
        }
        report = json.loads((out / "report.jsonl").read_text())
        assert report["source"] == "broken.wav"
        lengths = {name: len(levels_of(out / f"{name}.wav")) for name in ("a/x", "a/y.flac")}
        assert lengths == {"a/x": 400, "a/y.flac": 333}
        assert len(levels_of(out / "fast.wav")) == 400
        assert len(levels_of(out / "short.wav")) == 9
        generator = gatdist.load(vocoder)
        for name, wave in (("a/x", clip(0, 400)), ("b/stereo", stereo.mean(0, keepdims=True))):
            read = np.rint(wave * 32768) / 32768
            made = generator(wave=np.float32(read)[None])[0, 0].numpy()
            np.testing.assert_array_equal(levels_of(out / f"{name}.wav"), np.rint(made * 32768))

        nothing_to_do_later()
        (tmp_path / "in" / "broken.wav").unlink()
        before = (out / "a" / "x.wav").stat().st_mtime_ns
        outcome = gatdist.apply(vocoder, source, out)
        assert (outcome["written"], outcome["found"], outcome["skipped"]) == (0, 5, 0)
        assert (out / "a" / "x.wav").stat().st_mtime_ns == before
        assert not (out / "report.jsonl").exists()

    @pytest.fixture
    def nothing_to_do_later(self, request):
        return lambda: request.getfixturevalue("nothing_to_do")

    def test_a_rerun_generates_what_is_missing(self, vocoder, tmp_path):
        source = write(tmp_path / "in", {f"{i}.wav": wav(i, 300 + i) for i in range(5)})
        gatdist.apply(vocoder, source, tmp_path / "out")
        first = (tmp_path / "out" / "3.wav").read_bytes()
        (tmp_path / "out" / "3.wav").unlink()
        outcome = gatdist.apply(vocoder, source, tmp_path / "out")
        assert (outcome["written"], outcome["found"]) == (1, 4)
        assert (tmp_path / "out" / "3.wav").read_bytes() == first

    def test_spectrograms_give_what_their_recordings_give(self, vocoder, tmp_path):
        mel = gatdist.load(vocoder).task.mel
        recordings, spectrograms = {}, {}
        for i in range(2):
            recordings[f"{i}.wav"] = content = wav(i, 20 * HOP)
            wave = torch.from_numpy(soundfile.read(io.BytesIO(content), dtype="float32")[0])
            spectrograms[f"{i}.npy"] = encode_array(mel(wave[None, None])[0].numpy())
        spectrograms["turned.npy"] = encode_array(np.zeros((20, 12), np.float32))
        spectrograms["nan.npy"] = encode_array(np.full((12, 20), np.nan, np.float32))
        gatdist.apply(vocoder, write(tmp_path / "wav", recordings), tmp_path / "a")
        source = write(tmp_path / "npy", spectrograms)
        outcome = gatdist.apply(vocoder, source, tmp_path / "b")
        assert {name for name, _ in outcome["skipped_examples"]} == {"turned.npy", "nan.npy"}
        for i in range(2):
            one, other = ((tmp_path / f / f"{i}.wav").read_bytes() for f in "ab")
            assert one == other

    def test_tiles_are_in_positions_of_the_files(self, vocoder, tmp_path):
        files = {"0.npy": encode_array(np.zeros((12, 300), np.float32))}
        source = write(tmp_path / "in", files)
        outcome = gatdist.apply(vocoder, source, tmp_path / "out", tile=128)
        assert (outcome["written"], outcome["field"]) == (1, "mel")
        with refused(ConfigError, "--tile"):  # less than the receptive field, in samples
            gatdist.apply(
                vocoder, write(tmp_path / "wav", {"0.wav": wav(0)}), tmp_path / "b", tile=128
            )

    @pytest.mark.parametrize(("field", "length", "tile"), [("wave", 4096, 2048), ("mel", 256, 128)])
    def test_tiles_give_what_the_whole_gives(self, vocoder, field, length, tile, monkeypatch):
        generator = gatdist.load(vocoder).double()
        value = torch.randn(generator.shape_of(field)[0], length, dtype=torch.float64)
        one = work._Input("x", field, value, None, "x.wav")
        calls = []
        made = generator.made
        monkeypatch.setattr(generator, "made", lambda *a, **k: calls.append(a) or made(*a, **k))
        whole, tiled = (
            next(iter(work.Applied(generator, tile=size, batch=2).each([one])))[1]
            for size in (length, tile)
        )
        assert len(calls) > 2
        assert whole.shape[2] == length * (1 if field == "wave" else HOP)
        assert float((tiled - whole).abs().max() / whole.abs().max()) < 1e-12

    def test_a_long_recording_is_cut_into_tiles(self, vocoder, tmp_path, monkeypatch):
        monkeypatch.setitem(work._TILES, 1, 64)  # less than the receptive field
        source = write(tmp_path / "in", {"long.wav": wav(0, 9999)})
        sizes = []
        call = work.Applied._call
        monkeypatch.setattr(
            work.Applied,
            "_call",
            lambda self, f, v, k: sizes.append(v.shape) or call(self, f, v, k),
        )
        gatdist.apply(vocoder, source, tmp_path / "tiled")
        assert len(sizes) > 2
        assert max(shape[-1] for shape in sizes) < 9999 / 2
        monkeypatch.undo()
        gatdist.apply(vocoder, source, tmp_path / "whole")
        tiled, whole = (levels_of(tmp_path / f / "long.wav") for f in ("tiled", "whole"))
        assert len(tiled) == 9999
        assert abs(tiled.astype(int) - whole).max() <= 1


class TestTranslation:
    def test_images_of_all_accepted_sizes(self, translation, tmp_path):
        files = {f"{i}.png": png(i, SIDE * (1 + i % 2), SIDE) for i in range(4)}
        color = np.repeat(image(0), 3, axis=2)
        files |= {"color.png": encode_png(color), "odd.png": png(1, SIDE + 4, SIDE)}
        source = write(tmp_path / "in", files)
        outcome = gatdist.apply(translation, source, tmp_path / "out")
        assert (outcome["written"], outcome["field"]) == (5, "input")
        ((name, reason),) = outcome["skipped_examples"]
        assert name == "odd.png"
        assert f"multiples of {SIDE} × {SIDE}" in reason
        assert pixels_of(tmp_path / "out" / "1.png").shape == (2 * SIDE, SIDE, 3)
        expected = gatdist.load(translation)(input=image(0)[None])[0].numpy()
        for name in ("0.png", "color.png"):
            np.testing.assert_array_equal(pixels_of(tmp_path / "out" / name), expected)

    def test_dropout_accepts_larger_images(self, dropout, tmp_path):
        sizes = {"a.png": (64, 64), "b.png": (128, 64), "c.png": (64, 192), "odd.png": (64, 96)}
        source = write(tmp_path / "in", {name: png(0, *size) for name, size in sizes.items()})
        outcome = gatdist.apply(dropout, source, tmp_path / "out")
        assert (outcome["written"], outcome["skipped"]) == (3, 1)
        for name in ("a.png", "b.png", "c.png"):
            assert pixels_of(tmp_path / "out" / name).shape == (*sizes[name], 3)
        file = gatdist.export(dropout, "torch", out=tmp_path / "g")
        program = torch.export.load(file).module()
        generator = gatdist.load(dropout)
        noise = torch.randn(1, generator.network.noise_size)
        given = {"input": torch.rand(1, 1, 128, 192), "noise": noise}
        assert (program(**given) - generator(**given)).abs().max() < 1e-5

    def test_an_output_does_not_depend_on_the_files_beside_it(self, translation, tmp_path):
        files = {f"{i}.png": png(i) for i in range(5)}
        gatdist.apply(translation, write(tmp_path / "all", files), tmp_path / "a", batch=3)
        del files["0.png"], files["3.png"]
        gatdist.apply(translation, write(tmp_path / "few", files), tmp_path / "b", batch=3)
        for name in files:
            one, other = ((tmp_path / f / name).read_bytes() for f in "ab")
            assert one == other

    def test_a_data_set_gives_what_its_files_give(self, translation, tmp_path):
        data = translation.parent / "data-of-run"
        outcome = gatdist.apply(translation, data, tmp_path / "out", batch=4)
        assert outcome["written"] == 16
        expected = gatdist.load(translation)(input=np.stack([image(i) for i in range(16)]))
        found = [tmp_path / "out" / f"shard-{i // 8:06d}" / f"{i:04d}.png" for i in range(16)]
        for made, path in zip(expected.numpy(), found, strict=True):
            assert abs(pixels_of(path).astype(int) - made).max() <= 1

    def test_images_without_further_fields_are_the_inputs(self, translation, tmp_path):
        source = write(tmp_path / "in", {f"{i}.png": png(i) for i in range(3)})
        gatdist.pack(source, tmp_path / "packed", workers=1)
        outcome = gatdist.apply(translation, tmp_path / "packed", tmp_path / "out")
        assert outcome["written"] == 3

    def test_a_key_of_a_data_set_stays_inside(self, translation, tmp_path):
        samples = [("../../../evil", {"png": png(0)}), ("good", {"png": png(1)})]
        write_dataset(
            Store(str(tmp_path / "in")),
            [samples],
            modality="image",
            sample_shape=(1, SIDE, SIDE),
        )
        outcome = gatdist.apply(translation, tmp_path / "in", tmp_path / "x" / "y" / "out")
        assert (outcome["written"], outcome["skipped"]) == (1, 1)
        assert not list(tmp_path.rglob("*evil*"))

    def test_any_url(self, translation):
        source = Store("memory://apply/in")
        for i in range(2):
            source.publish(f"x/{i}.png", png(i))
        gatdist.apply(translation, "memory://apply/in", "memory://apply/out")
        assert set(Store("memory://apply/out").find()) == {"apply.json", "x/0.png", "x/1.png"}

    def test_large_images_are_cut_into_tiles(self, translation, tmp_path):
        source = write(tmp_path / "in", {"x.png": png(0, 20 * SIDE, 11 * SIDE)})
        gatdist.apply(translation, source, tmp_path / "a", tile=10 * SIDE)
        gatdist.apply(translation, source, tmp_path / "b", tile=20 * SIDE)
        tiled, whole = (pixels_of(tmp_path / f / "x.png").astype(int) for f in "ab")
        assert abs(tiled - whole).max() <= 1

    def test_a_network_that_sees_everything_gets_everything(self, instance, tmp_path, monkeypatch):
        source = write(tmp_path / "in", {"x.png": png(0, 4 * SIDE, 3 * SIDE)})
        gatdist.apply(instance, source, tmp_path / "out", tile=SIDE)
        expected = gatdist.load(instance)(input=image(0, 4 * SIDE, 3 * SIDE)[None])[0].numpy()
        np.testing.assert_array_equal(pixels_of(tmp_path / "out" / "x.png"), expected)
        monkeypatch.setattr(work, "_MAX_WHOLE", 100)
        with refused(DataError, "INPUT"):
            gatdist.apply(instance, source, tmp_path / "refused", tile=SIDE)


class TestOwnTask:
    def test_random_numbers_are_keyed_by_the_name(self, tmp_path, monkeypatch):
        run = train_inpainting(tmp_path / "run", monkeypatch)
        same = {"a.png": png(1), "b.png": png(1)}
        source = write(tmp_path / "in", same)
        gatdist.apply(run, source, tmp_path / "a")
        gatdist.apply(run, write(tmp_path / "one", {"b.png": png(1)}), tmp_path / "b", batch=1)
        first, second = ((tmp_path / "a" / name).read_bytes() for name in same)
        assert first != second  # holes in other places
        assert (tmp_path / "b" / "b.png").read_bytes() == second
        files = {"description.json": ""}
        path = gatdist.export(run, "torch", out=tmp_path / "g")
        program = torch.export.load(path, extra_files=files).module()
        given = {name: torch.zeros(2, 1, SIDE, SIDE) for name in ("masked", "hole")}
        assert torch.equal(program(**given), gatdist.load(run)(**given))


class TestClasses:
    def test_all_outputs_have_the_class_that_is_named(self, tmp_path, monkeypatch):
        run = train_labelled(tmp_path / "run", monkeypatch)
        source = write(tmp_path / "in", {"x.png": png(0), "large.png": png(1, 3 * SIDE, SIDE)})
        generator = gatdist.load(run)
        for label, number, out in ((0, 0, "first"), ("bee", 1, "second")):
            outcome = gatdist.apply(run, source, tmp_path / out, label=label, tile=2 * SIDE)
            assert outcome["written"] == 2
            for name, size in (("x.png", (SIDE, SIDE)), ("large.png", (3 * SIDE, SIDE))):
                given = image(name == "large.png", *size)[None]
                expected = generator(input=given, labels=torch.tensor([number]))[0].numpy()
                made = pixels_of(tmp_path / out / name).astype(int)
                assert abs(made - expected).max() <= 1
        assert content(tmp_path / "first") != content(tmp_path / "second")
        assert gatdist.apply(run, source, tmp_path / "second", label=1)["found"] == 2
        with refused(DataError, "OUT"):
            gatdist.apply(run, source, tmp_path / "second", label="ant")
        for label in ("", 2, "cow", "9" * 5000):
            with refused(ConfigError, "--label"):
                gatdist.apply(run, source, tmp_path / "third", label=label)
        file = gatdist.export(run, "torch", out=tmp_path / "g")
        program = torch.export.load(file).module()
        given = {"input": torch.rand(2, 1, 40, 24), "labels": torch.tensor([0, 1])}
        assert torch.allclose(program(**given), generator(**given), atol=1e-6)


class TestTables:
    def test_files_of_a_table_keep_their_names(self, translation, tmp_path):
        write(tmp_path / "in", {"img/1.png": png(1), "list.csv": b"input\nimg/1.png\n"})
        source = tmp_path / "in" / "list.csv"
        gatdist.apply(translation, source, tmp_path / "out", column="input")
        assert names_below(tmp_path / "out") == {"apply.json", "img/1.png"}

    def test_files_elsewhere_need_permission_and_stay_inside(self, translation, tmp_path):
        other = write(tmp_path / "other", {"secret.png": png(1)})
        write(tmp_path / "in", {"list.csv": f"file\n{other}/secret.png\n".encode()})
        source = tmp_path / "in" / "list.csv"
        with refused(DataError):
            gatdist.apply(translation, source, tmp_path / "out")
        gatdist.apply(translation, source, tmp_path / "out", allowed_origins=[str(other)])
        assert names_below(tmp_path / "out") == {"apply.json", f"{other}/secret.png"[1:]}

    @pytest.mark.parametrize(
        ("name", "component", "expected"),
        [
            ("a/b.JPG", "jpg", "a/b.png"),
            ("a.b/c.d.jpg", "jpg", "a.b/c.d.png"),
            ("x.parquet:7", "png", "x.parquet:7.png"),
            ("https://host/a/b.jpg?token=1", "jpg", "host/a/b.png"),
            ("/etc/b.jpg", "jpg", "etc/b.png"),
            ("C:\\a\\b.jpg", "jpg", "a/b.png"),
            ("../b.jpg", "jpg", ""),
            ("a/../../b.jpg", "jpg", ""),
            ("https://host/../../b.jpg", "jpg", ""),
            ("a\\..\\..\\b.jpg", "jpg", ""),
            ("a\0.jpg", "jpg", ""),
            ("..", "jpg", ""),
            ("/", "jpg", ""),
        ],
    )
    def test_names_stay_below_the_folder(self, name, component, expected):
        entry = Entry(name, (Part(component, Span(name)),))
        assert output_name(entry, ".png") == expected

    def test_two_inputs_of_one_output(self, translation, tmp_path):
        buffer = io.BytesIO()
        Image.fromarray(image(2)[..., 0]).save(buffer, "BMP")
        source = write(tmp_path / "in", {"x.png": png(1), "x.bmp": buffer.getvalue()})
        outcome = gatdist.apply(translation, source, tmp_path / "out")
        assert outcome["written"] == 1
        assert outcome["skipped_examples"][0][0] == "x.png"


BAD = {
    "no input": ({"run": "digits"}, ConfigError, "RUN"),
    "no run": ({"run": "in"}, CheckpointError, "in"),
    "no checkpoint": ({"checkpoint": 5}, CheckpointError, "--checkpoint"),
    "empty": ({"source": "empty"}, StorageError, "empty"),
    "nothing there": ({"source": "nothing"}, StorageError, "nothing"),
    "audio": ({"source": "speech"}, DataError, "INPUT"),
    "no field": ({"source": "clips"}, DataError, "INPUT"),
    "all broken": ({"source": "broken"}, DataError, "INPUT"),
    "all refused": ({"source": "odd"}, DataError, "INPUT"),
    "inside": ({"out": "in/out"}, DataError, "OUT"),
    "around": ({"source": "in/sub", "out": "in"}, DataError, "INPUT"),
    "the run": ({"out": "run"}, DataError, "OUT"),
    "other files": ({"out": "speech"}, DataError, "OUT"),
    "label": ({"label": 0}, ConfigError, "--label"),
    "tile": ({"tile": 5}, ConfigError, "--tile"),
    "no tile": ({"tile": 0}, ConfigError, "--tile"),
    "batch": ({"batch": 0}, ConfigError, "--batch"),
    "workers": ({"workers": 0}, ConfigError, "--workers"),
    "device": ({"device": "cuda:99"}, ConfigError, "--device"),
    "strict": ({"source": "mixed", "strict": True}, DataError, "bad.png"),
    "strict names": ({"source": "text", "strict": True}, DataError, "note.txt"),
}


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation") / "run"
    config = gatdist.load_config("ring", ["run.total_samples=8", "run.global_batch=8"])
    gatdist.train(config, str(folder), local=True)
    return folder


@pytest.fixture(scope="module")
def folder(translation, vocoder, generation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    os.symlink(translation, folder / "run")
    os.symlink(generation, folder / "digits")
    os.symlink(vocoder.parent / "data-of-run", folder / "clips")
    write(folder / "in", {"sub/0.png": png(0), "1.png": png(1)})
    write(folder / "speech", {"0.wav": wav(0)})
    write(folder / "broken", {"0.png": b"x", "1.png": png(0)[:-30]})
    write(folder / "odd", {"0.png": png(0, SIDE + 1, SIDE)})
    write(folder / "mixed", {"0.png": png(0), "bad.png": b"x"})
    write(folder / "text", {"0.png": png(0), "note.txt": b"x"})
    (folder / "empty").mkdir()
    os.symlink(folder / "in", folder / "link")
    return folder


class TestBadInput:
    @pytest.mark.parametrize("case", BAD)
    def test_is_named(self, case, folder, tmp_path, monkeypatch):
        options, kind, subject = BAD[case]
        monkeypatch.chdir(folder)
        before = names_below(folder)
        given = {"run": "run", "source": "in", "out": str(tmp_path / "out")} | options
        with refused(kind, subject):
            gatdist.apply(**given)
        assert names_below(folder) == before
        assert options.get("strict") or not list(tmp_path.rglob("*.png"))

    @pytest.mark.parametrize(
        ("source", "out", "subject"),
        [("in", "in/out", "OUT"), ("in/sub", "in", "INPUT"), ("in", "link/out", "OUT")],
    )
    @pytest.mark.parametrize("as_url", ["source", "out"])
    def test_urls_and_links_name_the_same_folders(self, source, out, subject, as_url, folder):
        given = {"source": folder / source, "out": folder / out}
        given[as_url] = f"file://{given[as_url]}"
        before = names_below(folder)
        with refused(DataError, subject):
            gatdist.apply(folder / "run", **given)
        assert names_below(folder) == before

    @pytest.mark.parametrize("name", ["x.png", "sub", "report.jsonl", "apply-spool"])
    @pytest.mark.parametrize("restarted", [False, True])
    def test_nothing_is_written_through_links(self, name, restarted, folder, tmp_path):
        source = write(tmp_path / "in", {"x.png": png(0), "sub/0.png": png(1), "note.txt": b"x"})
        out, outside = tmp_path / "out", tmp_path / "outside"
        if restarted:
            gatdist.apply(folder / "run", source, out)
            remove_all(str(out / name))
        out.mkdir(exist_ok=True)
        outside.mkdir()
        os.symlink(outside if name == "sub" else outside / "new", out / name)
        before = content(out)
        with refused(DataError, "OUT"):
            gatdist.apply(folder / "run", source, out)
        assert content(out) == before
        assert not list(outside.iterdir())

    def test_the_command_fails_with_one_line(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(folder)
        assert main(["apply", "digits", "in", str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_outputs_of_another_checkpoint_are_kept(self, vocoder, tmp_path):
        source = write(tmp_path / "in", {"0.wav": wav(0)})
        gatdist.apply(vocoder, source, tmp_path / "out", checkpoint=16)
        with refused(DataError, "OUT"):
            gatdist.apply(vocoder, source, tmp_path / "out")
        assert gatdist.apply(vocoder, source, tmp_path / "out", checkpoint=16)["found"] == 1
