"""The process-wide random generators: torch's on every device, NumPy's and Python's.

gatdist itself draws from :mod:`gatdist.parallel.draws`. Networks of users may draw from these
generators in their forward (``nn.Dropout``, ``torch.randn_like``, ``random.random``); they are
seeded before each such forward, so that what it draws is a function of the run's seed and of the
samples' positions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int, stream: str, position: int) -> None:
    """Seed all generators with a hash of the three; the host does not wait for a device.

    Args:
        seed: of the run.
        stream: names what is drawn.
        position: of the first sample, in the run.
    """
    text = f"{seed}/{stream}/{position}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    # torch.manual_seed does the same in a hundred times the time: it also queues what to do once
    # other devices are initialized.
    torch.default_generator.manual_seed(key >> 1)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(key >> 1)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002  (the shared one, which networks use)
    random.seed(key)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put all generators back at the end to where they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def generator_states(device: torch.device) -> dict[str, object]:
    """Each generator's state by name, to compare; torch's on the CPU and on ``device``."""
    _, words, place, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, object] = {
        "random": random.getstate(),
        "numpy.random": (np.asarray(words).tobytes(), place, rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if device.type == "cuda":
        states["torch on CUDA"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states
