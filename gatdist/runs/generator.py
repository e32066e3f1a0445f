"""A trained generator for inference: latents → samples, or fields → the generated field."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gatdist.common.errors import ConfigError, MissingFieldError, nearest
from gatdist.config import Config
from gatdist.data.sample_format import SampleFormat
from gatdist.game.build import Shapes, build_task
from gatdist.game.tasks import Draws, Fields, Record
from gatdist.models.layers import latents_from
from gatdist.parallel import draws
from gatdist.runs.trained import TrainedRun

_STREAM = "apply"  # of random numbers
_LEVELS = (torch.uint8, torch.uint16)


class Generator(nn.Module):
    """A run's averaged generator in evaluation mode, without weight or spectral normalization.

    Weights are those that the normalizations give. See :meth:`forward` for calling it.

    Args:
        network: With the trained weights; it is copied.
        config: Of the run.
        sample_format: Of the run's data.
        samples_seen: Of the checkpoint.

    Attributes:
        network: The plain module.
        task: Of the run.
        shapes: Of one sample in training, with the names of the inputs.
        formats: Format of each field of the data, by name.
    """

    def __init__(
        self, network: nn.Module, config: Config, sample_format: SampleFormat, samples_seen: int
    ) -> None:
        super().__init__()
        self.network = folded(copy.deepcopy(network)).eval()
        self.config, self.sample_format, self.samples_seen = config, sample_format, samples_seen
        self.task = build_task(config, sample_format.shape, sample_format.metadata)
        others = sample_format.metadata.get("fields", {})
        self.shapes = Shapes.of(self.task, sample_format.shape, sample_format.metadata)
        own, *_ = [*sample_format.fields.values(), sample_format]
        self.formats: Mapping[str, SampleFormat] = {
            self.task.target: own,
            **{name: sample_format.fields[name] for name in others},
        }

    @classmethod
    def of(cls, run: TrainedRun) -> Self:
        seen = run.checkpoint.state["samples_seen"]
        return cls(run.generator, run.config, run.sample_format, seen)

    @property
    def num_classes(self) -> int:
        """Number of classes that it is conditional on; 0: unconditional."""
        return self.sample_format.num_classes if self.config.model.conditional else 0

    def forward(
        self,
        latents: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        **fields: Any,
    ) -> Tensor:
        """Generate samples.

        Args:
            latents: [n, latent_size], if the task takes latents (``generation``).
            labels: int64 [n], of a class-conditional generator.
            noise: Standard normal [n, noise_size], of a generator with noise.
            positions: int64 [n], keys of random numbers; 0 to n − 1 by default. With fields,
                latents, noise and what the task draws are functions of it if not given.
            fields: By name, tensors or arrays of n samples: those of the data, such as ``input``
                or ``wave``, or all that the generator takes, such as ``mel``. Images are
                uint8 (or uint16) [n, H, W, C], or float [n, C, H, W] between −1 and 1; audio is
                float [n, C, t], full scale −1 to 1. ``wave`` is cut to a multiple of the hop.

        Returns:
            [n, …]: uint8 (or uint16) [n, H, W, C] if the input was, else float as the networks see
            it.

        Raises:
            ConfigError: A missing or unknown field, or one of another shape.
        """
        if not self.shapes.inputs:
            self._require(latents is not None and not fields, "latents", next(iter(fields), None))
            more = () if noise is None else (noise,)
            made: Tensor = self.network(latents, labels, *more)
            return made
        self._require(bool(fields), self._wanted, None)
        given = {name: torch.as_tensor(value) for name, value in fields.items()}
        found = {name: self._as_network(name, value) for name, value in given.items()}
        made = self.made(found, positions, latents=latents, labels=labels, noise=noise)
        is_levels = any(value.dtype in _LEVELS for value in given.values())
        if is_levels and self.formats[self.task.target].modality == "image":
            return self.sample_format.to_samples(made)
        return made

    @property
    def accepted(self) -> tuple[str, ...]:
        """Names of the fields that it can be called with."""
        return tuple(dict.fromkeys([*self.shapes.names, *self.formats]))

    def made(
        self,
        fields: Fields,
        positions: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the generated field; fields and result are as the networks see them."""
        like = next(iter(fields.values()))
        if positions is None:
            positions = torch.arange(len(like), device=like.device)
        arguments = self._arguments(fields, positions)
        seed, model = self.config.run.seed, self.config.model
        if self.task.takes_latents and latents is None:
            shape = (model.latent_size,)
            drawn = draws.normal(seed, _STREAM, positions, shape, like.dtype)
            latents = latents_from(drawn, model.latent_distribution)
        first = () if latents is None else (latents,)
        last = (
            draws.of_network(self.network, seed, _STREAM, positions, like.dtype)
            if noise is None
            else (noise,)
        )
        output = self.network(*first, *arguments, labels, *last)
        made: Tensor = output[self.task.target] if isinstance(output, dict) else output
        return made

    def _arguments(self, fields: Fields, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the network's inputs; those that are not given are computed from the others."""
        given, names = Record(fields), set(self.shapes.names)
        is_complete = names <= given.keys()
        if is_complete and names.isdisjoint(self.formats):
            return self.task.inputs(given)
        drawn = Draws(self.config.run.seed, f"/{_STREAM}", positions, is_training=False)
        try:
            given = Record(self.task.prepare(given, drawn))
        except ConfigError as error:  # it needs a field that only training has
            if isinstance(error, MissingFieldError) and not is_complete:
                rule = f"the generator takes {self._wanted}"
                raise ConfigError("fields", rule, value=list(fields)) from error
            if not is_complete:
                raise
        return self.task.inputs(given)

    @property
    def _wanted(self) -> str:
        """The network's inputs, and the fields of the data that they are computed from, if any."""
        names = " and ".join(self.shapes.names)
        if self.formats.keys() >= set(self.shapes.names):
            return names
        return f"{names}, or {' and '.join(self.formats)}"

    def _as_network(self, name: str, value: Tensor) -> Tensor:
        like = next(self.network.parameters())
        if name not in self.accepted:
            raise ConfigError(
                "fields", "no such field", value=name, hint=nearest(name, self.accepted)
            )
        tensor = value.to(like.device)
        form = self.formats.get(name)
        if tensor.dtype in _LEVELS and form is not None and form.modality == "image":
            if tensor.ndim != 4 or tensor.shape[3] != form.shape[0]:
                rule = f"must be images [n, height, width, {form.shape[0]}]"
                raise ConfigError(name, rule, value=list(tensor.shape))
            tensor = form.to_network(tensor)
        shape = self.shape_of(name)
        if tensor.ndim != 1 + len(shape) or tensor.shape[1] != shape[0]:
            rule = f"must be [n, {shape[0]}{', …' * (len(shape) - 1)}]"
            raise ConfigError(name, rule, value=list(tensor.shape))
        return tensor.to(like.dtype)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one sample's field in training, as the networks see it."""
        if name in self.shapes.names:
            return self.shapes.inputs[self.shapes.names.index(name)]
        return self.shapes.target if name == self.task.target else self.formats[name].shape

    def _require(self, holds: bool, needed: str, given: str | None) -> None:
        if not holds:
            rule = f"the generator takes {needed}, as the task is {self.config.game.task.name!r}"
            raise ConfigError("generator", rule, value=given)


def folded(network: nn.Module) -> nn.Module:
    """Replace weights that are computed, as by weight normalization, by their values, in place.

    All parameters are frozen.
    """
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            # A copy shares its class with the original, whose weight torch would remove.
            kind = type(module)
            own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                # torch makes a buffer of a weight that is computed from frozen tensors.
                module.requires_grad_(True)
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return network.requires_grad_(False)
