"""Sample formats: conversion between stored samples and network tensors.

Legend: n samples; images [C, H, W]; audio [C, t]; one-hot text and tokens [V, t] of vocabulary V.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatdist.data.codecs.arrays import encode_array
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.codecs.text import Vocabulary
from gatdist.data.modalities import Column, ReadSpec, columns


class SampleFormat(ABC):
    """Conversion between samples as read from a data set and network tensors.

    ``ending`` is the file extension of a sample, with its dot; ``rounding`` names the loss of
    precision in a file; ``level`` is the difference of neighboring values in network
    representation, 0 if samples are continuous.
    """

    modality: ClassVar[str]
    ending: ClassVar[str]
    rounding: str = "none"
    level: float = 0.0

    def __init__(self, spec: ReadSpec, fields: Mapping[str, SampleFormat] | None = None) -> None:
        self.spec = spec
        self.sample_shape = spec.shape
        self.num_classes = spec.num_classes
        self.fields = fields or {}
        places = columns({name: field.spec for name, field in self.fields.items()})
        self._columns = dict(zip(self.fields, places, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sample_shape

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Keyword arguments for networks, besides shape and number of classes."""
        fields = {"fields": self.shapes_of_fields} if self.fields else {}
        return {"modality": self.modality} | fields

    @property
    def shapes_of_fields(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the further fields in network representation, by name."""
        return {name: field.shape for name, field in list(self.fields.items())[1:]}

    def to_network(self, samples: Tensor) -> Tensor:
        """Convert samples as read to network tensors, float [n, *shape]."""
        own = next(iter(self._columns.values()), None)
        return self._to_network(samples if own is None else _column(samples, own))

    def inputs(self, samples: Tensor) -> dict[str, Tensor]:
        """Return the samples' further fields as network tensors, float [n, …], by name."""
        return {
            name: field._to_network(_column(samples, self._columns[name]))
            for name, field in list(self.fields.items())[1:]
        }

    def _to_network(self, samples: Tensor) -> Tensor:
        return samples

    def to_samples(self, outputs: Tensor) -> Tensor:
        """Convert network outputs, float [n, *shape], to samples as they would be read."""
        return outputs

    def rounded(self, outputs: Tensor) -> Tensor:
        """Return network outputs as they would be read from files, float [n, *shape]."""
        return self._to_network(self.to_samples(outputs))

    @abstractmethod
    def encode(self, sample: NDArray[Any]) -> bytes:
        """Return one sample of :meth:`to_samples` as a file."""


class ImageFormat(SampleFormat):
    """Images: uint8 or uint16 [n, H, W, C] ↔ float32 [n, C, H, W] in [−1, 1]."""

    modality, ending = "image", ".png"

    def __init__(self, spec: ReadSpec, fields: Mapping[str, SampleFormat] | None = None) -> None:
        super().__init__(spec, fields)
        self.rounding = f"{spec.bits} bits"
        self._dtype = torch.uint16 if spec.bits == 16 else torch.uint8
        self._half = (2**spec.bits - 1) / 2
        self.level = 1 / self._half

    def _to_network(self, samples: Tensor) -> Tensor:
        levels = samples.permute(0, 3, 1, 2).to(torch.float32)
        return levels.div_(self._half).sub_(1.0).contiguous()

    def to_samples(self, outputs: Tensor) -> Tensor:
        levels = outputs.permute(0, 2, 3, 1).float().add(1.0).mul_(self._half)
        return levels.add_(0.5).floor_().clamp_(0, 2 * self._half).to(self._dtype).contiguous()

    def encode(self, sample: NDArray[Any]) -> bytes:
        return encode_png(sample, compression=6)


class PointFormat(SampleFormat):
    """Points, float [n, *shape], unchanged."""

    modality, ending = "points", ".npy"

    def encode(self, sample: NDArray[Any]) -> bytes:
        return encode_array(sample.astype(np.float32))


class AudioFormat(SampleFormat):
    """Audio, float32 [n, C, t], full scale −1 to 1; files have 16 bits."""

    modality, ending, rounding = "audio", ".wav", "16 bits"

    @property
    def sample_rate(self) -> int:
        assert self.spec.sample_rate is not None
        return self.spec.sample_rate

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**super().metadata, "sample_rate": self.sample_rate}

    def to_samples(self, outputs: Tensor) -> Tensor:
        return outputs.mul(32768).round_().clamp_(-32768, 32767).div_(32768)

    def encode(self, sample: NDArray[Any]) -> bytes:
        return encode_wav(sample.astype(np.float32), self.sample_rate)


class TextFormat(SampleFormat):
    """Text: uint8 ids [n, t] ↔ one-hot [n, V, t]. Id 0 marks the end, and all after it."""

    modality, ending, rounding = "text", ".txt", "likeliest characters"

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.spec.vocabulary)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.vocabulary), *self.sample_shape

    def _to_network(self, samples: Tensor) -> Tensor:
        return _one_hot(samples, self.shape[0])

    def to_samples(self, outputs: Tensor) -> Tensor:
        ids = outputs.argmax(dim=1)
        before_end = (ids > 0).long().cumprod(dim=1)
        return (ids * before_end).to(torch.uint8)

    def encode(self, sample: NDArray[Any]) -> bytes:
        return self.vocabulary.decode(sample).encode()


class TokenFormat(SampleFormat):
    """Token sequences: int32 ids [n, t] ↔ one-hot [n, V, t]."""

    modality, ending, rounding = "tokens", ".npy", "likeliest tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.spec.num_tokens is not None
        return self.spec.num_tokens, *self.sample_shape

    def _to_network(self, samples: Tensor) -> Tensor:
        return _one_hot(samples, self.shape[0])

    def to_samples(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1).to(torch.int32)

    def encode(self, sample: NDArray[Any]) -> bytes:
        return encode_array(sample.astype(np.int32))


_FORMATS: dict[str, type[SampleFormat]] = {
    kind.modality: kind for kind in (ImageFormat, PointFormat, AudioFormat, TextFormat, TokenFormat)
}


def sample_format_of(spec: ReadSpec) -> SampleFormat:
    """Return the sample format of a modality."""
    fields = {name: _FORMATS[field.modality](field) for name, field in spec.of_fields().items()}
    if not fields:
        return _FORMATS[spec.modality](spec)
    own, *_ = fields
    return type(fields[own])(spec, fields)


def _column(records: Tensor, column: Column) -> Tensor:
    """Return one field of records, uint8 [n, bytes]."""
    part = records[:, column.begin : column.end].contiguous()
    dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
    return part.view(dtype).view(len(records), *column.shape)


def _one_hot(ids: Tensor, count: int) -> Tensor:
    encoded = torch.zeros(len(ids), count, ids.shape[1], device=ids.device)
    return encoded.scatter_(1, ids.long()[:, None], 1.0)
