"""A run with uniform latents is sampled and exported with the latents it was trained on."""

import io

import numpy as np
import pytest
import torch

import gatdist
from gatdist.config import load_config
from gatdist.runs import export, load_run
from gatdist.runs.export import load_exported
from gatdist.storage import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uniform") / "run"
    settings = [
        "model.latent_distribution=uniform",
        "run.total_samples=512",
        "run.checkpoint_every_samples=512",
        "evaluate.metrics=[]",
        "evaluate.every_samples=0",
    ]
    gatdist.train(load_config("ring", settings), str(folder), local=True)
    return folder


def test_samples_and_exported_inputs_have_the_same_uniform_latents(folder, tmp_path):
    run = load_run(Store(str(folder)), torch.device("cpu"))
    positions = torch.arange(300)
    latents = export.Exported(run).inputs(positions, seed=5)["latents"]
    assert float(latents.abs().max()) < 1
    assert float(latents.std()) == pytest.approx(3**-0.5, rel=0.05)
    files = gatdist.sample(folder, 300, out=tmp_path / "samples", seed=5)
    sampled = np.stack([np.load(file) for file in files])
    with torch.no_grad():
        made = run.generator(latents, None)
    np.testing.assert_allclose(sampled, made.numpy(), rtol=1e-4, atol=1e-5)
    program = torch.export.load(io.BytesIO(export.formats["torch"](run))).module()
    torch.testing.assert_close(program(latents=latents), made)
    loaded = load_exported(export.formats["safetensors"](run), "generator.safetensors")
    torch.testing.assert_close(loaded(latents, None), made)


def test_the_distribution_of_latents_is_part_of_the_result():
    uniform = load_config("ring", ["model.latent_distribution=uniform"])
    assert uniform.digest() != load_config("ring", []).digest()
