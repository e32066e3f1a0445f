"""Outputs of trained vocoders and translation networks, compared with simple methods.

Translation, on held-out pairs: the target of the training pair with the nearest input (mean squared
difference), and other runs, such as one trained with L1 alone. Distances of features use a
TorchScript module (``--features``); 200 images give a rank-deficient FID, so compare rows only.

Vocoders, on held-out clips and clips of other recordings (``--clips URL``): 60 iterations of
Griffin-Lim (1984) from the same log-mel spectrograms, accelerated as by Perraudin et al. (2013),
from magnitudes that are fitted to the mel bands without negative values.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gatdist
from benchmarks.case import parser, save
from gatdist.config import DataConfig
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.sample_format import AudioFormat
from gatdist.evaluation.distances import (
    GaussianSums,
    cross_similarity,
    frechet_distance,
    self_similarity,
)
from gatdist.evaluation.metrics import metrics
from gatdist.evaluation.paired import PairedMetric, Pairs
from gatdist.game.tasks import Draws, Vocoder
from gatdist.models.spectrograms import LogMelSpectrogram, reflected
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.generator import Generator

ITERATIONS, MOMENTUM = 60, 0.99
FIT_STEPS = 300  # of the magnitudes
SHOWN = 8
CPU = LocalCommunicator(torch.device("cpu"))

Fields = dict[str, Tensor]
Method = Callable[[Fields], Tensor]


def main() -> None:
    arguments = parser("pairs", __doc__)
    arguments.add_argument("run", help="a run of the task translation or vocoder, held_out > 0")
    arguments.add_argument("--other", action="append", default=[], metavar="NAME=RUN")
    arguments.add_argument("--clips", action="append", default=[], metavar="NAME=URL")
    arguments.add_argument("--features", metavar="FILE", help="TorchScript, as evaluate.features")
    given = arguments.parse_args()
    run = gatdist.load(given.run)
    data = run.config.data
    training = open_dataset(data)
    held_out = training.held_out()
    if held_out is None:
        arguments.error("the run must have data.held_out")
    sets = {"held out": fields_of(held_out)}
    for name, _, url in (each.partition("=") for each in given.clips):
        sets[name] = fields_of(open_dataset(DataConfig(url=url)))
    others = {name: gatdist.load(url) for name, _, url in (o.partition("=") for o in given.other)}
    methods: dict[str, Method] = {"run": partial(generated, run)}
    methods |= {name: partial(generated, other) for name, other in others.items()}
    if isinstance(run.task, Vocoder):
        methods["griffin_lim"] = partial(griffin_lim, run.task.mel)
    else:
        methods["nearest"] = partial(nearest, run, prepared(run, fields_of(training)))
    extractor = torch.jit.load(given.features).eval() if given.features else None
    found: dict[str, Any] = {}
    for set_name, fields in sets.items():
        for method, make in methods.items():
            torch.manual_seed(0)
            target = prepared(run, fields)[run.task.target]
            made = held_out.sample_format.to_samples(make(fields)).float()
            real = held_out.sample_format.to_samples(target).float()
            if run.task.target != "wave":  # levels [n, H, W, C]
                made, real = (x.permute(0, 3, 1, 2) / 127.5 - 1 for x in (made, real))
            values = measured(made, real, held_out, extractor)
            found[f"{set_name}, {method}"] = values
            print(set_name, method, {name: round(value, 4) for name, value in values.items()})
            write(given.out / set_name.replace(" ", "_") / method, made[:SHOWN], held_out)
        write(given.out / set_name.replace(" ", "_") / "target", real[:SHOWN], held_out)
    save(given.out, {"run": Path(given.run).name, "methods": found, "samples": counts(sets)})


def counts(sets: dict[str, Fields]) -> dict[str, int]:
    return {name: len(next(iter(fields.values()))) for name, fields in sets.items()}


def fields_of(dataset: Dataset) -> Fields:
    """Return all samples, as networks see them; the generated field is ``target`` or ``wave``."""
    samples, _ = dataset.read(np.arange(dataset.num_samples))
    read, form = torch.from_numpy(samples), dataset.sample_format
    target = "wave" if isinstance(form, AudioFormat) else "target"
    return {target: form.to_network(read), **form.inputs(read)}


def prepared(run: Generator, fields: Fields) -> Fields:
    positions = torch.arange(len(next(iter(fields.values()))))
    return dict(run.task.prepare(fields, Draws(0, "", positions, is_training=False)))


@torch.no_grad()
def generated(run: Generator, fields: Fields) -> Tensor:
    ready = prepared(run, fields)
    size = len(ready[run.task.target])
    parts = [
        run.made(
            {name: x[i : i + 16] for name, x in ready.items()}, torch.arange(i, min(i + 16, size))
        )
        for i in range(0, size, 16)
    ]
    return torch.cat(parts)


def nearest(run: Generator, training: Fields, fields: Fields) -> Tensor:
    """Return the targets of the training pairs with the nearest inputs."""
    known, asked = (x["input"].flatten(1) for x in (training, prepared(run, fields)))
    return training["target"][torch.cdist(asked, known).argmin(1)]


def griffin_lim(mel: LogMelSpectrogram, fields: Fields) -> Tensor:
    """Estimate the phases of log-mel spectrograms; return clips [n, 1, t]."""
    wave = fields["wave"]
    wave = wave[:, :, : wave.shape[2] // mel.hop * mel.hop]
    bands = mel._bands.float()
    magnitude = fitted(mel(wave).exp(), bands)
    spectrum = magnitude * torch.exp(2j * torch.pi * torch.rand_like(magnitude))
    previous = torch.zeros_like(spectrum)
    for iteration in range(ITERATIONS):
        again = spectra(mel, signal(mel, spectrum, wave.shape[2]))
        ahead = again + MOMENTUM / (1 + MOMENTUM) * (again - previous) if iteration else again
        spectrum = magnitude * ahead / ahead.abs().clamp_min(1e-12)
        previous = again
    return signal(mel, spectrum, wave.shape[2])[:, None]


def fitted(mels: Tensor, bands: Tensor) -> Tensor:
    """Return magnitudes [n, bins, f] ≥ 0 with the least squared error in the bands [n, b, f]."""
    step = 1 / torch.linalg.matrix_norm(bands, 2).square()
    found = (torch.linalg.pinv(bands) @ mels).clamp_min(0)
    for _ in range(FIT_STEPS):
        found = (found - step * (bands.mT @ (bands @ found - mels))).clamp_min(0)
    return found


def spectra(mel: LogMelSpectrogram, clips: Tensor) -> Tensor:
    padded = reflected(clips[:, None], (mel.window - mel.hop) // 2)[:, 0]
    frames = padded.unfold(1, mel.window, mel.hop) * torch.hann_window(mel.window)
    return torch.fft.rfft(frames).mT


def signal(mel: LogMelSpectrogram, spectrum: Tensor, length: int) -> Tensor:
    """Overlap-add with the window that has the least squared error; [n, t]."""
    window, padding = torch.hann_window(mel.window), (mel.window - mel.hop) // 2
    frames = torch.fft.irfft(spectrum.mT, n=mel.window) * window
    whole, weight = (
        torch.nn.functional.fold(
            x.mT, (1, length + 2 * padding), (1, mel.window), stride=(1, mel.hop)
        )[:, 0, 0]
        for x in (frames, window.square().expand_as(frames))
    )
    return (whole / weight.clamp_min(1e-8))[:, padding : padding + length]


def measured(made: Tensor, real: Tensor, dataset: Dataset, extractor: Any) -> dict[str, float]:
    form = dataset.sample_format
    rate = form.sample_rate if isinstance(form, AudioFormat) else 0
    names = ["l1", "psnr", "ssim"] if not rate else ["log_mel", "stft", "pitch"]
    if rate and importlib.util.find_spec("pesq"):
        names.append("pesq")
    pairs = Pairs(made, real, rate)
    found: dict[str, float] = {}
    for name in names:
        metric = metrics[name]
        assert isinstance(metric, PairedMetric)
        values = metric.of(pairs).nanmean(0)
        found |= dict(zip(metric.values, values.tolist(), strict=True))
    if extractor is not None:
        a, b = (features(extractor, x) for x in (made, real))
        found["fid"] = frechet_distance(GaussianSums.of(a), GaussianSums.of(b))
        found["kid"] = (
            self_similarity(a, CPU) + self_similarity(b, CPU) - 2 * cross_similarity(a, b, CPU)
        )
    return found


@torch.no_grad()
def features(extractor: Any, images: Tensor) -> Tensor:
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return torch.cat([extractor(part) for part in pixels.split(32)]).double()


def write(folder: Path, samples: Tensor, dataset: Dataset) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    form = dataset.sample_format
    for i, sample in enumerate(samples):
        if isinstance(form, AudioFormat):
            content, ending = encode_wav(sample.numpy().astype(np.float32), form.sample_rate), "wav"
        else:
            pixels = ((sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            content, ending = encode_png(pixels.permute(1, 2, 0).contiguous().numpy()), "png"
        (folder / f"{i}.{ending}").write_bytes(content)


if __name__ == "__main__":
    main()
