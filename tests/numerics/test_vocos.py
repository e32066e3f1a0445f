"""The Vocos generator."""

import pytest
import torch

from gatdist.common.errors import ConfigError
from gatdist.models.vocos import Vocos
from support import refused

HOP, WINDOW, FRAMES = 16, 64, 20


def built(bands=10, hop=HOP, frames=FRAMES, **options):
    torch.manual_seed(0)
    return Vocos(
        input_shapes=((bands, frames),), sample_shape=(1, frames * hop), num_classes=0, **options
    )


def test_published_size():
    parameters = built(bands=100, hop=256).parameters()
    assert sum(p.numel() for p in parameters) == 13_531_650  # 13.5 M


@pytest.mark.parametrize(("hop", "window"), [(16, 64), (16, 48), (15, 45)])
def test_windows_are_added_to_the_clip_whose_spectra_they_are(hop, window):
    """With spectra of frames that are centered alike, its inverse transform is exact."""
    clip = torch.randn(2, FRAMES * hop, dtype=torch.float64)
    torch.testing.assert_close(overlapped(hop, window, clip), clip)


def overlapped(hop, window, clip):
    network = built(hop=hop, window=window, width=4, hidden=4, blocks=1).double()
    hann = network.hann
    margin = (window - hop) // 2
    frames = torch.nn.functional.pad(clip, (margin, margin)).unfold(1, window, hop) * hann
    weights = hann.square().expand(1, FRAMES, -1)
    return network._overlapped(frames * hann) / network._overlapped(weights)


def test_a_spectrum_of_a_tone_makes_the_tone():
    network = built(width=4, hidden=4, blocks=1).double()
    with torch.no_grad():
        network.finish.weight.zero_()
        network.finish.bias.fill_(-50)  # no magnitude
        network.finish.bias[WINDOW // 2 + 1 :] = 0
        network.finish.bias[4] = torch.tensor(8.0).log()  # one period per hop: frames are in phase
        made = network(torch.randn(1, 10, FRAMES, dtype=torch.float64))[0, 0]
    time = torch.arange(len(made)) - (WINDOW - HOP) // 2 * -1
    inner = slice(2 * WINDOW, -2 * WINDOW)
    tone = torch.cos(2 * torch.pi * 4 * time / WINDOW)[inner]
    correlation = torch.nn.functional.cosine_similarity(made[inner], tone.double(), dim=0)
    assert correlation > 1 - 1e-9


def test_magnitudes_are_limited():
    network = built(width=4, hidden=4, blocks=1)
    with torch.no_grad():
        network.finish.bias.fill_(90.0)
        assert network(torch.randn(1, 10, FRAMES)).isfinite().all()


@pytest.mark.parametrize("window", [24, 40, 8, HOP])
def test_windows_that_do_not_fit_are_refused(window):
    with refused(ConfigError, "model.generator.window"):
        built(window=window)
