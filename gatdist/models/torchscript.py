"""Networks from TorchScript files.

TorchScript is a program: its digest is checked before it runs.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.jit._fuser import optimized_execution
from torch.utils._python_dispatch import _disable_current_modes

from gatdist.common.errors import ConfigError
from gatdist.config import redact_url


def read_verified(url: str, sha256: str, *, file_key: str, sha256_key: str) -> bytes:
    """Return a file's content if it has the digest.

    Args:
        url: Path or URL.
        sha256: Expected SHA-256, in hex.
        file_key: Configuration key of the file, for messages.
        sha256_key: Likewise of the digest.

    Raises:
        ConfigError: The file or the digest is not given, or the digest is another one.
        StorageError: The file can't be read.
    """
    # A machine that only benchmarks steps has no fsspec.
    from gatdist.storage.store import at_file
    from gatdist.storage.urls import absolute

    for key, value in ((file_key, url), (sha256_key, sha256)):
        if not value:
            raise ConfigError(key, "is required", hint="Give the file and its SHA-256")
    store, name = at_file(absolute(url))
    content = store.read(name)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256.lower():
        rule = f"{redact_url(url)} has another digest: {found}"
        hint = "Download the file again, or correct the digest if you trust the file"
        raise ConfigError(sha256_key, rule, value=sha256, hint=hint)
    return content


class FrozenNetwork:
    """A TorchScript module that is not trained, run operator by operator.

    The executor's fusions begin after some calls, so that the first steps of a run and of a resumed
    one would have other rounding errors than later steps.

    Args:
        content: Of the file.

    Raises:
        RuntimeError: It is no TorchScript, or its module has no ``forward`` of images.

    Attributes:
        parameters: Names of the arguments of its ``forward`` besides the images.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._modules: dict[tuple[torch.device, torch.dtype | None], Any] = {}
        forward = getattr(self._on(torch.device("cpu"), None), "forward", None)
        names = [] if forward is None else [each.name for each in forward.schema.arguments]
        if len(names) < 2:
            raise RuntimeError("its module has no forward of images")
        self.parameters = tuple(names[2:])  # after self and the images

    def _on(self, device: torch.device, dtype: torch.dtype | None) -> Any:
        if (device, dtype) not in self._modules:
            # Tensors without values, of which costs are counted, can't be loaded.
            with _disable_current_modes(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated
                module = torch.jit.load(io.BytesIO(self._content), map_location=device)
            for parameter in module.parameters():
                parameter.requires_grad_(False)
            self._modules[device, dtype] = module.eval().to(dtype=dtype)
        return self._modules[device, dtype]

    def __call__(
        self, images: Tensor, *, dtype: torch.dtype | None = None, **arguments: Any
    ) -> Any:
        """Call ``forward`` on the device of the images, with parameters of ``dtype``, if given."""
        with optimized_execution(False):
            return self._on(images.device, dtype)(images, **arguments)
