"""Export of a trained generator: ONNX, ``torch.export``, or weights that gatdist loads.

An exported generator maps latents [n, latent_size] of the run's distribution, labels int64 [n] if
class-conditional, and standard normal noise [n, noise_size] if it takes noise, to samples [n, …] as
networks see them, for any n.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from gatdist.common.errors import CheckpointError, ConfigError, TrainingError
from gatdist.common.registry import Registry
from gatdist.common.strict_json import parse_json
from gatdist.common.tensor_files import read_safetensors
from gatdist.config import parse_config
from gatdist.data.modalities import ReadSpec
from gatdist.data.sample_format import sample_format_of
from gatdist.runs import TrainedRun, networks_with

TOLERANCE = 1e-4  # of the exported generator's samples to torch's
_ONNX_VERSION = 18
_CHECKED = 5  # compared samples; not the number of the traced ones
_METADATA = "gatdist"
_MALFORMED = (ValueError, KeyError, TypeError, RecursionError, OverflowError)

# Run → content of a file; TrainingError if the exported generator's samples differ.
formats: Registry[Callable[[TrainedRun], bytes]] = Registry("--format")
ENDINGS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}


@formats.register("safetensors")
def to_safetensors(run: TrainedRun) -> bytes:
    """Return the weights, with the configuration for :func:`load_exported` in the metadata."""
    about = {
        "config": run.config.redacted(),
        "samples": run.sample_format.spec.model_dump(mode="json"),
        "samples_seen": run.checkpoint.state["samples_seen"],
    }
    weights = {name: tensor.contiguous() for name, tensor in run.generator.state_dict().items()}
    return safetensors.torch.save(weights, {_METADATA: json.dumps(about)})


def load_exported(content: bytes, name: str) -> nn.Module:
    """Return the generator in a file ``name`` by :func:`to_safetensors`, in evaluation mode."""
    try:
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = parse_json(header["__metadata__"][_METADATA])
        weights = read_safetensors(content)
        config, spec = parse_config(about["config"]), ReadSpec.model_validate(about["samples"])
    except (*_MALFORMED, ConfigError) as error:
        rule = f"is not a generator exported by gatdist ({error!r})"
        raise CheckpointError(name, rule, hint="Export it again") from None
    network, _ = networks_with(config, sample_format_of(spec), {"generator": weights}, name)
    return network


@formats.register("torch")
def to_torch(run: TrainedRun) -> bytes:
    """Return a program of ``torch.export``, which ``torch.export.load`` reads without gatdist."""
    file = io.BytesIO()
    torch.export.save(_program(run), file)
    content = file.getvalue()
    program = torch.export.load(io.BytesIO(content)).module()
    _require_equal(run, lambda inputs: program(*inputs.values()))
    return content


@formats.register("onnx")
def to_onnx(run: TrainedRun) -> bytes:
    """Return an ONNX model: ``latents``, ``labels``, ``noise`` → ``samples``."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        rule, hint = f"needs a missing package ({error})", "pip install 'gatdist[export]'"
        raise ConfigError("--format", rule, value="onnx", hint=hint) from None
    names = list(given(run, torch.arange(1), seed=0))
    with tempfile.TemporaryDirectory(prefix="gatdist-export-") as folder, _quiet_exporter():
        path = Path(folder, "generator.onnx")
        exported = torch.onnx.export(
            _program(run),
            input_names=names,
            output_names=["samples"],
            opset_version=_ONNX_VERSION,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert exported is not None
        exported.save(str(path))
        content = path.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def make(inputs: dict[str, Tensor]) -> Tensor:
        fed = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(np.asarray(session.run(None, fed)[0]))

    _require_equal(run, make)
    return content


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence torch's exporter, which reports internals and optional packages."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


class _Exported(nn.Module):
    """A generator that takes only the arguments that it needs."""

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        self.network, self.has_labels = run.generator.cpu(), bool(run.num_classes)

    def forward(self, *inputs: Tensor) -> Tensor:
        latents, *more = inputs
        labels = () if self.has_labels else (None,)
        samples: Tensor = self.network(latents, *labels, *more)
        return samples


def given(run: TrainedRun, positions: Tensor, seed: int) -> dict[str, Tensor]:
    """Return an exported generator's arguments for samples of ``gatdist sample``, int64 [n]."""
    latents, labels, noise = run.sampler(seed, "sample").inputs(positions)
    found = {"latents": latents}
    if labels is not None:
        found["labels"] = labels
    if noise:
        found["noise"] = noise[0]
    return found


def _program(run: TrainedRun) -> torch.export.ExportedProgram:
    inputs = tuple(given(run, torch.arange(2), seed=0).values())
    shapes: Any = {"inputs": ({0: torch.export.Dim("batch")},) * len(inputs)}
    return torch.export.export(_Exported(run).eval(), inputs, dynamic_shapes=shapes)


def _require_equal(run: TrainedRun, make: Callable[[dict[str, Tensor]], Tensor]) -> None:
    inputs = given(run, torch.arange(_CHECKED), seed=0)
    with torch.no_grad():
        expected = _Exported(run)(*inputs.values())
    difference = float((make(inputs) - expected).abs().max())
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"the exported generator differs from torch's by {difference:.2g}, more than "
            f"{TOLERANCE}. Report this to the authors"
        )
