"""The process-wide random generators of torch (on every device), NumPy and Python.

gatdist itself draws from :mod:`gatdist.parallel.draws`. Users' networks may draw from these
generators in their forward (``nn.Dropout``, ``torch.randn_like``, ``random.random``). They are
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
    """Seed all generators with a hash of the arguments, without waiting for a device.

    Args:
        seed: Of the run.
        stream: Name of what is drawn.
        position: Position of the first sample in the run.
    """
    text = f"{seed}/{stream}/{position}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    # torch.manual_seed takes a hundred times as long: it also queues seeds for devices that are not
    # initialized yet.
    torch.default_generator.manual_seed(key >> 1)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(key >> 1)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002  (the shared one, which networks use)
    random.seed(key)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the state of all generators at the end."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def generator_states(device: torch.device) -> dict[str, object]:
    """Return each generator's state by name, torch's on the CPU and on ``device``, to compare."""
    _, words, place, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, object] = {
        "random": random.getstate(),
        "numpy.random": (np.asarray(words).tobytes(), place, rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if device.type == "cuda":
        states["torch on CUDA"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states
