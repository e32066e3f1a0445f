"""What networks see of samples, and back: each kind of samples has a space.

Legend: n samples; pictures of C channels, H × W; sounds of C channels and t places; texts of V
characters and t places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatdist.data.codecs import Vocabulary, encode_array, encode_png, encode_wav
from gatdist.data.modalities import ReadSpec


class SampleFormat(ABC):
    """A space of samples.

    Args:
        spec: what the samples are, as they are read.

    Attributes:
        modality: of the spec.
        ending: of the file of one sample, with its dot.
        rounding: what a file makes of the numbers, for protocols.
        sample_shape: of one sample as it is read.
        num_classes: 0 where there are no labels.
    """

    modality: ClassVar[str]
    ending: ClassVar[str]
    rounding: str = "none"

    def __init__(self, spec: ReadSpec) -> None:
        self.spec = spec
        self.sample_shape = spec.shape
        self.num_classes = spec.num_classes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample as networks see it."""
        return self.sample_shape

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What networks may want to know of the samples beyond shape and classes, by name."""
        return {"modality": self.modality}

    @abstractmethod
    def to_network(self, samples: Tensor) -> Tensor:
        """Samples as they are read → float [n, *shape], as networks see them."""

    @abstractmethod
    def to_samples(self, seen: Tensor) -> Tensor:
        """The inverse: what networks made, float [n, *shape] → samples as they would be read."""

    @abstractmethod
    def encode(self, sample: NDArray[Any]) -> bytes:
        """One sample, as :meth:`to_samples` gives it, as a file."""

    def rounded(self, seen: Tensor) -> Tensor:
        """What networks would see of fakes [n, *shape] that were written and read again."""
        return self.to_network(self.to_samples(seen))


class ImageFormat(SampleFormat):
    """Images: uint8 or uint16 [n, H, W, C] ↔ float32 [n, C, H, W] in [−1, 1]."""

    modality, ending = "image", ".png"

    def __init__(self, spec: ReadSpec) -> None:
        super().__init__(spec)
        self.rounding = f"{spec.bits} bits"
        self._dtype = torch.uint16 if spec.bits == 16 else torch.uint8
        self._half = (2**spec.bits - 1) / 2

    def to_network(self, samples: Tensor) -> Tensor:
        """0 to 255, or 0 to 65,535, become −1 to 1."""
        levels = samples.permute(0, 3, 1, 2).to(torch.float32)
        return levels.div_(self._half).sub_(1.0).contiguous()

    def to_samples(self, seen: Tensor) -> Tensor:
        """Clamped to [−1, 1] and rounded."""
        levels = seen.permute(0, 2, 3, 1).float().add(1.0).mul_(self._half)
        return levels.add_(0.5).floor_().clamp_(0, 2 * self._half).to(self._dtype).contiguous()

    def encode(self, sample: NDArray[Any]) -> bytes:
        """PNG, of as many bits."""
        return encode_png(sample, compression=6)


class PointFormat(SampleFormat):
    """Points, float [n, *shape], as they are."""

    modality, ending = "points", ".npy"

    def to_network(self, samples: Tensor) -> Tensor:
        """The same."""
        return samples

    def to_samples(self, seen: Tensor) -> Tensor:
        """The same."""
        return seen

    def encode(self, sample: NDArray[Any]) -> bytes:
        """``.npy``, float32."""
        return encode_array(sample.astype(np.float32))


class AudioFormat(SampleFormat):
    """Sounds, float32 [n, C, t], as they are: full scale is −1 to 1."""

    modality, ending, rounding = "audio", ".wav", "16 bits"

    @property
    def sample_rate(self) -> int:
        """In hertz."""
        assert self.spec.sample_rate is not None
        return self.spec.sample_rate

    @property
    def metadata(self) -> Mapping[str, Any]:
        """``sample_rate`` besides."""
        return {"modality": self.modality, "sample_rate": self.sample_rate}

    def to_network(self, samples: Tensor) -> Tensor:
        """The same."""
        return samples

    def to_samples(self, seen: Tensor) -> Tensor:
        """Clipped and rounded as a file of 16 bits has them."""
        return seen.mul(32768).round_().clamp_(-32768, 32767).div_(32768)

    def encode(self, sample: NDArray[Any]) -> bytes:
        """WAV of 16 bits."""
        return encode_wav(sample.astype(np.float32), self.sample_rate)


class TextFormat(SampleFormat):
    """Texts: uint8 ids [n, t] ↔ one-hot [n, V, t]; id 0 means that the text has ended."""

    modality, ending, rounding = "text", ".txt", "likeliest characters"

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids stand for."""
        return Vocabulary(self.spec.vocabulary)

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, t)."""
        return len(self.vocabulary), *self.sample_shape

    def to_network(self, samples: Tensor) -> Tensor:
        """One-hot."""
        return _one_hot(samples, self.shape[0])

    def to_samples(self, seen: Tensor) -> Tensor:
        """The likeliest characters, and nothing behind the first end."""
        ids = seen.argmax(dim=1)
        going_on = (ids > 0).long().cumprod(dim=1)
        return (ids * going_on).to(torch.uint8)

    def encode(self, sample: NDArray[Any]) -> bytes:
        """UTF-8."""
        return self.vocabulary.decode(sample).encode()


class TokenFormat(SampleFormat):
    """Sequences of tokens: int32 ids [n, t] ↔ one-hot [n, V, t]."""

    modality, ending, rounding = "tokens", ".npy", "likeliest tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, t)."""
        assert self.spec.num_tokens is not None
        return self.spec.num_tokens, *self.sample_shape

    def to_network(self, samples: Tensor) -> Tensor:
        """One-hot."""
        return _one_hot(samples, self.shape[0])

    def to_samples(self, seen: Tensor) -> Tensor:
        """The likeliest tokens."""
        return seen.argmax(dim=1).to(torch.int32)

    def encode(self, sample: NDArray[Any]) -> bytes:
        """``.npy``, int32."""
        return encode_array(sample.astype(np.int32))


_FORMATS: dict[str, type[SampleFormat]] = {
    kind.modality: kind for kind in (ImageFormat, PointFormat, AudioFormat, TextFormat, TokenFormat)
}


def sample_format_of(spec: ReadSpec) -> SampleFormat:
    """The space of samples that are like this."""
    return _FORMATS[spec.modality](spec)


def _one_hot(ids: Tensor, count: int) -> Tensor:
    """Ids [n, t] → float32 [n, count, t]."""
    seen = torch.zeros(len(ids), count, ids.shape[1], device=ids.device)
    return seen.scatter_(1, ids.long()[:, None], 1.0)
