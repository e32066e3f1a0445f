"""Modalities: sample files, sample arrays and decoders, and the configured sample format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gatdist.common.errors import DataError
from gatdist.config import DataConfig
from gatdist.data.codecs.arrays import decode_point_into, decode_tokens_into
from gatdist.data.codecs.audio import AUDIO_EXTENSIONS, decode_audio_into
from gatdist.data.codecs.formats import IMAGE_COMPONENTS, same_aspect
from gatdist.data.codecs.images import decode_image_into
from gatdist.data.codecs.text import Vocabulary, decode_text_into
from gatdist.data.format.manifest import TARGET, FieldSpec, Manifest, SampleSpec

_ALIGNMENT = 8  # bytes: of the fields in a record

# Decodes a file into a sample's array, or raises CodecError.
Decode = Callable[[bytes | memoryview, NDArray[Any]], None]


class ReadSpec(SampleSpec):
    """Sample format as read: all samples have the same shape."""

    vocabulary: str | None = None  # of text: the characters of ids 1, 2, …; None for bytes

    def of_fields(self) -> dict[str, ReadSpec]:
        """Return the format of each field by name, that of the generated one first."""
        if self.fields is None:
            return {}
        own = self.model_copy(update={"fields": None})
        others = {name: ReadSpec(**field.model_dump()) for name, field in self.fields.items()}
        return {TARGET: own} | others

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of images, (C, n) of audio, (n,) of text and tokens, any shape of points."""
        return tuple(n for n in self.sample_shape if n is not None)


class Modality(NamedTuple):
    """Properties of a modality."""

    noun: str  # singular, for messages
    components: tuple[str, ...]  # file extensions
    dtype: DTypeLike  # of sample arrays
    keys: tuple[str, ...] = ()  # of the configuration


MODALITIES: Mapping[str, Modality] = {
    "image": Modality(
        "image", IMAGE_COMPONENTS, np.uint8, ("resolution", "channels", "dequantize", "x_flip")
    ),
    "points": Modality("array", ("npy",), np.float32),
    "audio": Modality("audio clip", AUDIO_EXTENSIONS, np.float32, ("channels", "length")),
    "text": Modality("text", ("txt",), np.uint8, ("length", "vocabulary")),
    "tokens": Modality("token sequence", ("npy",), np.int32, ("length",)),
}


def components_of(modality: str, component: str | None) -> Sequence[str]:
    """Return the file extensions that a field's files may have; see :class:`FieldSpec`."""
    known = MODALITIES[modality].components
    if component is None:
        return known
    begin, star, _ = component.partition("*")
    return [f"{begin}{each}" for each in known] if star else [component]


_DECODERS: Mapping[str, Callable[[ReadSpec, str | None], Decode]] = {
    "image": lambda spec, resize: partial(decode_image_into, resize=resize),
    "points": lambda spec, resize: decode_point_into,
    "audio": lambda spec, resize: partial(decode_audio_into, sample_rate=spec.sample_rate or 0),
    "text": lambda spec, resize: partial(decode_text_into, vocabulary=Vocabulary(spec.vocabulary)),
    "tokens": lambda spec, resize: partial(decode_tokens_into, num_tokens=spec.num_tokens or 0),
}


def decoders_of(spec: ReadSpec, resize: str | None) -> list[Decode]:
    """Return the decoder of each file of a sample; ``resize`` is from :func:`resizing`."""
    fields = spec.of_fields()
    if not fields:
        return [_DECODERS[spec.modality](spec, resize)]
    return [
        partial(_decode_column, _DECODERS[field.modality](field, resize), column)
        for field, column in zip(fields.values(), columns(fields), strict=True)
    ]


class Column(NamedTuple):
    """Where a field is in a record: bytes ``begin`` to ``end``, an array of ``dtype``."""

    begin: int
    end: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def columns(fields: Mapping[str, ReadSpec]) -> list[Column]:
    """Return where each field is in a record."""
    found, begin = [], 0
    for field in fields.values():
        dtype, shape = _array_of(field)
        size = math.prod(shape) * dtype.itemsize
        found.append(Column(begin, begin + size, dtype, shape))
        begin += -(-size // _ALIGNMENT) * _ALIGNMENT
    return found


def _decode_column(
    decode: Decode, column: Column, content: bytes | memoryview, record: NDArray[Any]
) -> None:
    part = record[column.begin : column.end].view(column.dtype)
    decode(content, part.reshape(column.shape))


def _array_of(spec: ReadSpec) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return dtype and shape of a decoded sample: [H, W, C] of images, else ``sample_shape``."""
    shape, dtype = spec.shape, np.dtype(MODALITIES[spec.modality].dtype)
    if spec.modality == "image":
        shape = (*shape[1:], shape[0])
        dtype = np.dtype(np.uint16) if spec.bits == 16 else dtype
    return dtype, shape


def new_samples(spec: ReadSpec, count: int) -> NDArray[Any]:
    """Allocate uint8 or uint16 [count, H, W, C] of images, else [count, *sample_shape].

    Samples of several fields are records, uint8 [count, bytes]; see :func:`columns`.
    """
    if fields := spec.of_fields():
        length = -(-columns(fields)[-1].end // _ALIGNMENT) * _ALIGNMENT
        return np.empty((count, length), dtype=np.uint8)
    dtype, shape = _array_of(spec)
    return np.empty((count, *shape), dtype=dtype)


def join(parts: Sequence[NDArray[Any]], out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Write samples or records of n side by side into records, uint8 [n, bytes]; return them."""
    begin = 0
    for part in parts:
        flat = np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8)
        out[:, begin : begin + flat.shape[1]] = flat
        begin += -(-flat.shape[1] // _ALIGNMENT) * _ALIGNMENT
    return out


def read_spec(manifest: Manifest, config: DataConfig, url: str) -> ReadSpec:
    """Return the format in which a data set is read. Raises DataError if the keys do not fit.

    ``resolution`` applies to all fields of images, ``length`` to all fields with a length.
    """
    fields = manifest.fields or {}
    own = MODALITIES[manifest.modality]
    known = {key for field in fields.values() for key in MODALITIES[field.modality].keys}
    for key in ("resolution", "channels", "length", "vocabulary", "dequantize", "x_flip"):
        value = getattr(config, key)
        applies = key in own.keys or (key in ("resolution", "length") and key in known)
        if value not in (None, False) and not applies:
            rule = f"does not apply to the {own.noun}s in {url}"
            raise DataError(f"data.{key}", rule, value=value, hint="Remove it")
    if fields and config.channels is not None:
        rule = f"does not apply to the samples in {url}, which have several fields"
        raise DataError("data.channels", rule, value=config.channels, hint="Pack with --color")
    if config.resolution is not None:
        _require_one_aspect([manifest, *fields.values()], config, url)
    values = {name: getattr(manifest, name) for name in SampleSpec.model_fields}
    read = {
        name: field.model_copy(update={"sample_shape": _shape_read(field, config, url)})
        for name, field in fields.items()
    }
    shape = _shape_read(manifest, config, url)
    values |= {"sample_shape": shape, "vocabulary": config.vocabulary, "fields": read or None}
    return ReadSpec.model_validate(values)


def _require_one_aspect(fields: Sequence[FieldSpec], config: DataConfig, url: str) -> None:
    """Raise DataError if crops of a sample's images would show different parts."""
    shapes = [field.sample_shape[1:] for field in fields if field.modality == "image"]
    sizes = [(h, w) for h, w in shapes if h is not None and w is not None]
    if not all(same_aspect(sizes[0], size) for size in sizes):
        found = " and ".join(f"{h} × {w}" for h, w in dict.fromkeys(sizes))
        rule = (
            f"the images of a sample in {url} differ in aspect ratio ({found}) and can't be cropped"
        )
        hint = "Remove it, or pack with --transform stretch"
        raise DataError("data.resolution", rule, value=config.resolution, hint=hint)


def _shape_read(field: FieldSpec, config: DataConfig, url: str) -> list[int]:
    modality = MODALITIES[field.modality]
    shape = list(field.sample_shape)
    if config.channels is not None and "channels" in modality.keys:
        shape[0] = _channels(field, config.channels, url)
    if config.resolution is not None and "resolution" in modality.keys:
        size = config.resolution
        shape[1:] = [size, size] if isinstance(size, int) else size
    if config.length is not None and "length" in modality.keys:
        longest = field.sample_shape[-1]
        if longest is not None and config.length > longest:
            rule = f"must be at most {longest:,}, the length of the {modality.noun}s in {url}"
            raise DataError("data.length", rule, value=config.length, hint="Lower or remove it")
        shape[-1] = config.length
    found = [number for number in shape if number is not None]
    if len(found) < len(shape):
        is_image = field.modality == "image"
        key, what = ("resolution", "size") if is_image else ("length", "length")
        rule = f"the {modality.noun}s in {url} differ in {what}"
        raise DataError(f"data.{key}", rule, hint=f"Choose one with data.{key}")
    return found


def resizing(manifest: Manifest, config: DataConfig, spec: ReadSpec) -> str | None:
    """Return the filter that resizes images; None if all have the right size."""
    read = [spec, *(spec.fields or {}).values()]
    for field, wanted in zip([manifest, *(manifest.fields or {}).values()], read, strict=True):
        if field.modality == "image" and field.sample_shape[1:] != wanted.sample_shape[1:]:
            return config.resize
    return None


def _channels(field: FieldSpec, channels: int, url: str) -> int:
    if field.modality == "image":
        allowed: tuple[int | None, ...] = (1, 3)
        rule = "must be 1 (gray) or 3 (RGB)"
    else:
        allowed = (1, field.sample_shape[0])
        rule = f"must be 1 or {field.sample_shape[0]} for the audio in {url}"
    if channels not in allowed:
        raise DataError("data.channels", rule, value=channels)
    return channels
