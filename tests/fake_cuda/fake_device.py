"""Fake CUDA devices: a library that makes torch accept fake tensors on ``cuda`` without CUDA.

Import this module and call :func:`load` before ``import torch``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).resolve().parents[2] / ".tools" / "fake_cuda"


class UnavailableError(Exception):
    """Fake CUDA devices can't be had on this machine; the message says why."""


def load() -> None:
    """Register the devices, compiling their library if it is not in the cache.

    Raises:
        UnavailableError: There is no g++, or torch is built with CUDA.
    """
    assert "torch" not in sys.modules, "the devices must be registered before torch is loaded"
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


def library() -> Path:
    """Return the library's path, keyed by torch's version and the source.

    Raises:
        UnavailableError: As :func:`load`.
    """
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        raise UnavailableError("torch is built with CUDA, whose devices can't be replaced")
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source).hexdigest()[:16]
    path = CACHE / f"torch-{version('torch')}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(path)
    return path


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _compile(path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise UnavailableError("not installed: g++ (make setup-system)")
    torch = _torch()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        subprocess.run(
            [
                *(compiler, "-shared", "-fPIC", "-std=c++20", "-O0", "-w"),
                *(f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"),
                *(str(SOURCE), "-o", str(made)),
                *(f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"),
            ],
            check=True,
            timeout=300,
        )
        os.replace(made, path)  # several processes may compile it at once
