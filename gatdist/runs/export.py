"""Export of a trained generator: ONNX, ``torch.export``, or weights that gatdist loads.

An exported generator maps its inputs to samples [n, …] as networks see them, for any n. The inputs
are latents [n, latent_size] of the run's distribution, or fields [n, …] of the task, such as
``mel`` or ``input``, of any length, height and width that the network accepts; labels int64 [n] if
class-conditional; and standard normal noise [n, noise_size] if it takes noise.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from gatdist.common.errors import CheckpointError, ConfigError, TrainingError
from gatdist.common.registry import Registry
from gatdist.common.strict_json import parse_json
from gatdist.common.tensor_files import read_safetensors
from gatdist.config import parse_config
from gatdist.data.modalities import ReadSpec
from gatdist.data.sample_format import sample_format_of
from gatdist.models.tiling import periods_of
from gatdist.runs import TrainedRun, networks_with
from gatdist.runs.generator import Generator

TOLERANCE = 1e-4  # of the exported generator's samples to torch's
_ONNX_VERSION = 18
_CHECKED = 5  # compared samples; not the number of the traced ones
_METADATA = "gatdist"
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
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


def load_exported(content: bytes, name: str) -> Generator:
    """Return the generator in a file ``name`` by :func:`to_safetensors`."""
    try:
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = parse_json(header["__metadata__"][_METADATA])
        weights = read_safetensors(content)
        config, spec = parse_config(about["config"]), ReadSpec.model_validate(about["samples"])
        samples_seen = int(about["samples_seen"])
    except (*_MALFORMED, ConfigError) as error:
        rule = f"is not a generator exported by gatdist ({error!r})"
        raise CheckpointError(name, rule, hint="Export it again") from None
    sample_format = sample_format_of(spec)
    network, _ = networks_with(config, sample_format, {"generator": weights}, name)
    return Generator(network, config, sample_format, samples_seen)


@formats.register("torch")
def to_torch(run: TrainedRun) -> bytes:
    """Return a program of ``torch.export``, which ``torch.export.load`` reads without gatdist.

    Its module takes the inputs by name. Its extra file ``description.json`` holds
    :attr:`Exported.description`.
    """
    exported, file = Exported(run), io.BytesIO()
    about = {"description.json": json.dumps(exported.description)}
    with _quiet_exporter():
        torch.export.save(exported.program, file, extra_files=about)
    content = file.getvalue()
    program = torch.export.load(io.BytesIO(content)).module()
    exported.require_equal(lambda inputs: program(**inputs))
    return content


@formats.register("onnx")
def to_onnx(run: TrainedRun) -> bytes:
    """Return an ONNX model: ``latents`` or fields, ``labels``, ``noise`` → ``samples``.

    The entry ``gatdist`` of its metadata holds :attr:`Exported.description`.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        rule, hint = f"needs a missing package ({error})", "pip install 'gatdist[export]'"
        raise ConfigError("--format", rule, value="onnx", hint=hint) from None
    exported = Exported(run)
    with tempfile.TemporaryDirectory(prefix="gatdist-export-") as folder, _quiet_exporter():
        path = Path(folder, "generator.onnx")
        model = torch.onnx.export(
            exported.program,
            input_names=list(exported.description["inputs"]),
            output_names=["samples"],
            opset_version=_ONNX_VERSION,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert model is not None
        model.model.metadata_props[_METADATA] = json.dumps(exported.description)
        model.save(str(path))
        content = path.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def make(inputs: dict[str, Tensor]) -> Tensor:
        fed = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(np.asarray(session.run(None, fed)[0]))

    exported.require_equal(make)
    return content


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence torch's exporters, which report internals and optional packages."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _module_of(generator: Generator, names: Sequence[str]) -> nn.Module:
    """Return a module whose forward takes only the arguments that it needs, called ``names``."""
    target = generator.task.target
    count = len(generator.shapes.inputs) + generator.task.takes_latents
    has_labels = "labels" in names

    def forward(self: Any, **given: Tensor) -> Tensor:
        inputs = [given[name] for name in names]
        labels = () if has_labels else (None,)
        output = self.network(*inputs[:count], *labels, *inputs[count:])
        samples: Tensor = output[target] if isinstance(output, dict) else output
        return samples

    parameters = [inspect.Parameter(name, _POSITIONAL) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    module: nn.Module = type("Exported", (nn.Module,), {"forward": forward})()
    module.network = generator.network
    return module.eval()


class Exported:
    """A run's generator as it is exported, on the CPU; and examples of its arguments."""

    def __init__(self, run: TrainedRun) -> None:
        self._run, self.generator = run, Generator.of(run).cpu()
        self._module = _module_of(self.generator, list(self.inputs(torch.arange(1), seed=0)))

    @cached_property
    def periods(self) -> tuple[int, ...]:
        """Numbers whose multiples the input accepts along each axis; 0: the training length."""
        shapes = self.generator.shapes.inputs
        if len(shapes) != 1:
            return ()
        (name,) = self.generator.shapes.names
        like = next(self.generator.parameters()).detach()

        def made(field: Tensor) -> Tensor:
            labels = torch.zeros(len(field), dtype=torch.int64)
            given = labels if self.generator.num_classes else None
            return self.generator.made({name: field}, labels=given)

        with torch.no_grad():
            found = periods_of(made, shapes[0], like)
        return found or (0,) * (len(shapes[0]) - 1)

    def inputs(self, positions: Tensor, seed: int, blocks: int = 0) -> dict[str, Tensor]:
        """Return arguments for samples of ``gatdist sample``, int64 [n].

        Of a generator with inputs, these are random; their sides are those of training and
        ``blocks`` periods more along the first axis, twice as many along the second.
        """
        latents, labels, noise = self._run.sampler(seed, "sample").inputs(positions)
        shapes, random = self.generator.shapes, torch.Generator().manual_seed(seed)
        found = {"latents": latents} if self.generator.task.takes_latents else {}
        for name, shape in zip(shapes.names, shapes.inputs, strict=True):
            more = [blocks * i * period for i, period in enumerate(self.periods, 1)]
            sides = [side + extra for side, extra in zip_longest(shape[1:], more, fillvalue=0)]
            field = torch.rand(len(positions), shape[0], *sides, generator=random)
            found[name] = (2 * field - 1).to(latents.dtype)
        if labels is not None:
            found["labels"] = labels
        if noise:
            found["noise"] = noise[0]
        return found

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The program, with as many dynamic sides as the network allows."""
        if any(self.periods):
            try:
                found = self._exported()
                called = found.module()
                self.require_equal(lambda inputs: called(**inputs))
                return found
            except Exception:  # the network branches on the sides
                self.periods = (0,) * len(self.periods)
        return self._exported()

    def _exported(self) -> torch.export.ExportedProgram:
        inputs = self.inputs(torch.arange(2), seed=0, blocks=1)
        batch = torch.export.Dim("batch")
        sides = {
            2 + axis: torch.export.Dim(side) if period == 1 else period * torch.export.Dim(side)
            for axis, (side, period) in enumerate(zip(self._sides, self.periods, strict=True))
            if period
        }
        fields = self.generator.shapes.names
        shapes: Any = {name: {0: batch} | (sides if name in fields else {}) for name in inputs}
        # Else a side of one period, such as the training length, would be a case of its own.
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            return torch.export.export(self._module, (), inputs, dynamic_shapes=shapes)

    @property
    def _sides(self) -> tuple[str, ...]:
        return ("length",) if len(self.periods) == 1 else ("height", "width")[: len(self.periods)]

    @property
    def description(self) -> dict[str, Any]:
        """What a user of the file needs, as JSON values.

        ``task``; ``inputs``, by name the shape and the multiples that sides may have; ``output``,
        its field and its sample format; ``parameters`` of computed fields, such as ``mel``;
        ``samples_seen``.
        """
        inputs = {
            name: {
                "shape": [None, *tensor.shape[1:]],
                "multiples_of": dict(zip(self._sides, self.periods, strict=True))
                if name in self.generator.shapes.names
                else {},
            }
            for name, tensor in self.inputs(torch.arange(1), seed=0).items()
        }
        return {
            "task": self.generator.config.game.task.name,
            "inputs": inputs,
            "output": {
                "field": self.generator.task.target,
                "format": self.generator.sample_format.spec.model_dump(mode="json"),
            },
            "parameters": self.generator.task.parameters,
            "samples_seen": self.generator.samples_seen,
        }

    def require_equal(self, make: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """Raise TrainingError unless ``make`` gives what torch gives, for other sides, too."""
        for blocks in {0, 2 if any(self.periods) else 0}:
            inputs = self.inputs(torch.arange(_CHECKED), 0, blocks)
            with torch.no_grad():
                expected = self._module(**inputs)
            difference = float((make(inputs) - expected).abs().max())
            if not difference <= TOLERANCE:
                raise TrainingError(
                    f"the exported generator differs from torch's by {difference:.2g}, more than "
                    f"{TOLERANCE}. Report this to the authors"
                )
