"""Convert whole samples: the files of all fields together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict

from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.audio import read_audio_header
from gatdist.data.codecs.formats import same_aspect
from gatdist.data.codecs.images import read_image_header
from gatdist.packing.convert import CONVERTERS, Converter
from gatdist.packing.fetch import Contents
from gatdist.packing.recipe import Recipe


class Field(BaseModel):
    """How the files of one field are converted."""

    model_config = ConfigDict(frozen=True)

    name: str  # "" if it is the only one
    modality: str
    recipe: Recipe
    sample_shape: tuple[int, ...]  # after conversion


class Sample(NamedTuple):
    """A sample as it is packed."""

    components: dict[str, bytes]  # files by extension, in the order of the fields
    remarks: Mapping[str, str]  # details by kind


class Samples:
    """Converts the files of samples, one for each field."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = fields
        self._convert: list[Converter] = [
            CONVERTERS[field.modality](field.recipe, field.sample_shape) for field in fields
        ]
        self._names = [field.name for field in fields]
        images = [i for i, field in enumerate(fields) if field.modality == "image"]
        audio = [i for i, field in enumerate(fields) if field.modality == "audio"]
        recipe = fields[0].recipe
        is_cropped = recipe.size is not None and recipe.transform != "stretch"
        self._cropped = images if is_cropped and len(images) > 1 else []
        self._parallel = audio if len(audio) > 1 else []

    @classmethod
    def like(
        cls, recipe: Recipe, modalities: Mapping[str, str], samples: Sequence[Contents]
    ) -> Self | None:
        """Return a converter to what most of these have in common; None if none is usable.

        ``modalities`` are those of the fields by name. Raises DataError if they have too little in
        common, or do not fit the recipe.
        """
        if recipe.clip_length is not None and set(modalities.values()) != {"audio"}:
            rule = f"must be audio to be cut into clips, and holds {', '.join(modalities.values())}"
            raise DataError("--clip-length", rule, value=recipe.clip_length, hint="Remove it")
        fields = []
        for i, (name, modality) in enumerate(modalities.items()):
            contents = [files[i] for files in samples]
            readable = [content for content in contents if isinstance(content, bytes)]
            convert = CONVERTERS[modality].like(recipe, readable)
            if convert is None:
                return None
            fields.append(
                Field(
                    name=name,
                    modality=modality,
                    recipe=convert.recipe,
                    sample_shape=convert.sample_shape,
                )
            )
        rates = {f.name: f.recipe.sample_rate for f in fields if f.modality == "audio"}
        if len(set(rates.values())) > 1:
            found = ", ".join(f"{name} {rate:,} Hz" for name, rate in rates.items())
            rule = f"the fields differ in sample rate: {found}"
            raise DataError("--sample-rate", rule, hint="Resample all with --sample-rate HZ")
        return cls(fields)

    def __call__(self, contents: Contents) -> Iterator[Sample]:
        """Yield the samples that the files of one entry become; several for a recording.

        Raises CodecError if one is unreadable or does not fit the others.
        """
        files = self._readable(contents)
        self._require_one_aspect(files)
        span_s = self._common_span(files)
        streams = [self._samples(i, content, span_s) for i, content in enumerate(files)]
        yield from map(_merged, zip(*streams, strict=True))

    def count(self, contents: Contents) -> int:
        """Return how many samples the files of one entry become. Raises CodecError."""
        return self._convert[0].count(self._readable(contents)[0])

    def _readable(self, contents: Contents) -> list[bytes]:
        files = []
        for i, content in enumerate(contents[: len(self.fields)]):
            if isinstance(content, str):
                raise self._named(i, CodecError(content))
            files.append(content)
        return files

    def _samples(self, i: int, content: bytes, span_s: Fraction | None) -> Iterator[Sample]:
        name = self._names[i]
        try:
            for component, packed, remarks in self._convert[i].samples(content, span_s):
                component = f"{name}.{component}" if name else component
                details = {kind: f"{name} {text}".strip() for kind, text in remarks.items()}
                yield Sample({component: packed}, details)
        except CodecError as error:
            raise self._named(i, error) from error

    def _named(self, i: int, error: CodecError) -> CodecError:
        return CodecError(f"its {self._names[i]} {error}", error.hint) if self._names[i] else error

    def _require_one_aspect(self, files: Sequence[bytes]) -> None:
        """Raise CodecError if crops of a sample's images would show different parts."""
        found = {}
        for i in self._cropped:
            try:
                header = read_image_header(files[i])
            except CodecError as error:
                raise self._named(i, error) from error
            found[self._names[i]] = header.height, header.width
        for (one, (h, w)), (other, (height, width)) in combinations(found.items(), 2):
            if not same_aspect((h, w), (height, width)):
                sizes = f"{one} is {h} × {w}, {other} {height} × {width}"
                rule = f"has images that differ in aspect ratio: {sizes} (height × width)"
                raise CodecError(rule, hint="Crop them first, or use --transform stretch")

    def _common_span(self, files: Sequence[bytes]) -> Fraction | None:
        """Return how long the audio of all fields is, in seconds; CodecError if they differ."""
        found = {}
        for i in self._parallel:
            try:
                header = read_audio_header(files[i])
            except CodecError as error:
                raise self._named(i, error) from error
            found[self._names[i]] = Fraction(header.length, header.sample_rate), header.sample_rate
        for (one, (span, rate)), (other, (length, hertz)) in combinations(found.items(), 2):
            if abs(span - length) > Fraction(1, min(rate, hertz)):
                times = f"{one} is {float(span):.3f} s, {other} {float(length):.3f} s"
                raise CodecError(
                    f"has audio that differs in length: {times}", hint="Align it first"
                )
        return min((span for span, _ in found.values()), default=None)


def _merged(parts: Sequence[Sample]) -> Sample:
    merged = Sample({}, {})
    for part in parts:
        merged.components.update(part.components)
        merged = merged._replace(remarks={**merged.remarks, **part.remarks})
    return merged
