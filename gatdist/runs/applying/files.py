"""Files that a generator is applied to: which field they are, and their content as a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.arrays import read_npy
from gatdist.data.codecs.audio import open_recording
from gatdist.data.codecs.images import decode_pixels
from gatdist.data.sample_format import SampleFormat
from gatdist.packing.clips import window
from gatdist.packing.entries import MODALITY, Entry
from gatdist.packing.sources.files import plain_path
from gatdist.runs.generator import Generator

_MAX_NUMBERS = 2**28  # of a resampled clip


@dataclass(frozen=True)
class Readable:
    """Fields that a generator makes its output from, by the modality of their files.

    Attributes:
        main: The field of the data that is read.
        is_target: Whether it is the one that is generated, such as a vocoder's recordings.
        fields: The field of each modality of files: ``image``, ``audio`` or ``array``.
    """

    main: str
    is_target: bool
    fields: Mapping[str, str]


def readable_fields(generator: Generator, run: str) -> Readable:
    """Return the fields that files may hold: that of the data, or what is computed from it.

    Raises:
        ConfigError: ``run`` takes no input, or several.
    """
    names, formats = generator.shapes.names, generator.formats
    if not names:
        rule = "its generator takes no input"
        raise ConfigError("RUN", rule, value=run, hint=f"gatdist sample {run} --num 100 --out OUT")
    given = [name for name in names if name in formats]
    if len(given) > 1:
        rule = f"its generator takes several fields: {', '.join(given)}"
        raise ConfigError("RUN", rule, value=run, hint="Use gatdist.load in Python")
    main = given[0] if given else generator.task.target
    kinds = {"image": "image", "audio": "audio", "points": "array"}
    modality = formats[main].modality
    if modality not in kinds:
        raise ConfigError("RUN", f"its generator takes {modality}", value=run)
    fields = {kinds[modality]: main}
    if not given and len(names) == 1:
        fields.setdefault("array", names[0])
    return Readable(main, main == generator.task.target, fields)


def output_name(entry: Entry, ending: str) -> str:
    """Return an output's name below OUT: the input's, with ``ending``; "" if it would be outside.

    Of a URL, it begins with the server or bucket; of an absolute path, with its first folder.
    """
    name = entry.name
    if "://" in name:
        name = name.partition("?")[0].partition("#")[0].partition("://")[2]
    name, component = plain_path(name), entry.fields[0].component
    if name.lower().endswith(f".{component}"):
        name = name[: -len(component) - 1]
    is_inside = name and ".." not in name.split("/") and name.isprintable()
    return f"{name}{ending}" if is_inside else ""


class Reader:
    """Reads files as tensors [c, *sides], as the generator's network sees them."""

    def __init__(self, generator: Generator, readable: Readable) -> None:
        self._generator, self._readable = generator, readable
        shape, target = generator.shape_of(readable.main), generator.shapes.target
        # Outputs are made for blocks of samples; audio is padded to whole ones.
        self._block = 1
        if readable.is_target:
            inputs = generator.shapes.inputs[0]
            self._block = max(1, target[-1] // inputs[-1])
        self._shortest = shape[-1]

    def __call__(self, component: str, content: bytes) -> tuple[str, Tensor, int | None]:
        """Return the field's name, its tensor, and the length of its output (None: all of it).

        Raises CodecError if the file is damaged or does not fit.
        """
        modality = MODALITY.get(component, "")
        name = self._readable.fields.get(modality)
        if name is None:
            wanted = " or ".join(self._readable.fields)
            raise CodecError(f"is not {wanted} (.{component})")
        if modality == "array":
            return name, self._array(content, self._generator.shape_of(name)), None
        form = self._generator.formats[name]
        if modality == "image":
            pixels = np.array(decode_pixels(content, form.shape[0], bits=form.spec.bits).pixels)
            return name, form.to_network(torch.from_numpy(pixels)[None])[0], None
        clip = _clip(content, form)
        length = clip.shape[1]
        blocks = max(math.ceil(length / self._block) * self._block, self._shortest)
        return name, torch.nn.functional.pad(clip, (0, blocks - length)), length

    def _array(self, content: bytes, shape: tuple[int, ...]) -> Tensor:
        array = read_npy(content)
        if array.ndim != len(shape) or array.shape[0] != shape[0] or array.dtype.kind not in "fiu":
            expected = ", ".join([str(shape[0]), *("any" for _ in shape[1:])])
            found = f"{array.dtype} of shape {list(array.shape)}"
            raise CodecError(f"is {found}, expected numbers of shape [{expected}]")
        if not array.size or not np.isfinite(array).all():
            raise CodecError("holds no numbers, or non-finite ones")
        return torch.from_numpy(array.astype(np.float32))


def _clip(content: bytes, form: SampleFormat) -> Tensor:
    """Return a recording with the channels and the sample rate of the run's data, [c, t]."""
    channels, rate = form.shape[0], form.metadata["sample_rate"]
    with open_recording(content) as recording:
        header = recording.header
        if not header.length:
            raise CodecError("holds no samples")
        if channels not in (1, header.channels) and header.channels != 1:
            raise CodecError(f"has {header.channels} channels, expected {channels}")
        length = math.ceil(Fraction(header.length * rate, header.sample_rate))
        if length * channels > _MAX_NUMBERS:
            rule = f"has {header.length:,} samples at {header.sample_rate:,} Hz"
            raise CodecError(f"{rule}, which are more than {_MAX_NUMBERS:,} at {rate:,} Hz")
        clip = window(recording, 0, length, rate, mono=channels == 1)
    return torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32)).expand(channels, -1)


def writer(generator: Generator) -> Callable[[Tensor, int | None], bytes]:
    """Return a function from an output [1, c, *sides], and its length or None, to a file."""
    form = generator.sample_format

    def encode(output: Tensor, length: int | None) -> bytes:
        kept = output if length is None else output[..., :length]
        return form.encode(form.to_samples(kept.float())[0].cpu().numpy())

    return encode
