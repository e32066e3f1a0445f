"""The manifest of a data set: sample format and shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from gatdist.common.errors import DataError
from gatdist.common.registry import validation_problem
from gatdist.common.strict_json import parse_json
from gatdist.config import DataConfig
from gatdist.data.codecs.labels import is_printable
from gatdist.data.order import ORDER_VERSION
from gatdist.storage import Store
from gatdist.storage.urls import OutsideUrl, options_for

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
TARGET = "target"  # the generated field, if samples have several

_MAKE_AGAIN = "Pack or index the data again"

Modality = Literal["image", "points", "audio", "text", "tokens"]

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Sums must fit in 64 bits.
_Positive = Annotated[int, Field(gt=0, lt=2**48)]
_MOST_NUMBERS = 2**40  # in a sample: more than any memory holds


def fits_manifest(name: str) -> bool:
    """Return whether a shard may have this name: printable, and inside the data set's folder."""
    return is_printable(name) and not any(part in ("", ".", "..") for part in name.split("/"))


def _valid_name(name: str) -> str:
    if not fits_manifest(name):
        raise ValueError("must be the name of a file in the folder, or in one below it")
    return name


def _valid_text(value: str) -> str:
    value.encode()  # raises ValueError for an unpaired surrogate, which JSON may hold
    return value


_Name = Annotated[str, AfterValidator(_valid_name)]
_Text = Annotated[str, AfterValidator(_valid_text)]


class FieldSpec(BaseModel):
    """Format of one field of the samples, which is one file of each."""

    model_config = ConfigDict(frozen=True, strict=True)

    modality: Modality
    # (C, H, W) of images, (C, n) of audio, (n,) bytes of text, (n,) tokens, any shape of points.
    # H and W, or n, are None if samples differ in them.
    sample_shape: list[_Positive | None]
    bits: Literal[8, 16] = 8  # per channel of decoded images
    # File extension of samples, such as ``png`` or ``target.png``. None for any of the modality,
    # ``target.*`` for any after ``target.``.
    component: Annotated[str, Field(pattern=r"^[^/A-Z*]+(\.\*)?$")] | None = None
    sample_rate: _Positive | None = None  # of audio, in hertz
    # Size of the token vocabulary; ids are int32.
    num_tokens: Annotated[int, Field(gt=0, le=2**31)] | None = None

    @model_serializer(mode="wrap")
    def _without_usual_values(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what did not always exist, to keep the fingerprint of older data sets."""
        values: dict[str, Any] = write(self)
        if self.bits == 8:
            values.pop("bits", None)
        if values.get("fields") is None:
            values.pop("fields", None)
        return values

    @model_validator(mode="after")
    def _has_shape_of_modality(self) -> Self:
        shape, modality = self.sample_shape, self.modality
        if math.prod(n for n in shape if n is not None) > _MOST_NUMBERS:
            raise ValueError(f"a sample must hold at most {_MOST_NUMBERS:,} numbers")
        if modality == "image":
            if (
                len(shape) != 3
                or shape[0] not in (1, 3)
                or (shape[1] is None) != (shape[2] is None)
            ):
                raise ValueError("the sample_shape of images must be [1 or 3, height, width]")
        elif self.bits != 8:
            raise ValueError("only images have bits")
        elif modality == "points":
            if not shape or None in shape:
                raise ValueError("the sample_shape of points must hold integers")
        elif modality == "audio":
            if len(shape) != 2 or shape[0] is None or self.sample_rate is None:
                raise ValueError("audio needs sample_rate and the sample_shape [channels, length]")
        elif len(shape) != 1 or (modality == "tokens" and self.num_tokens is None):
            raise ValueError("text needs the sample_shape [length], and tokens num_tokens")
        return self


class SampleSpec(FieldSpec):
    """Sample format of a data set: of the field that is generated, labels, and further fields."""

    num_classes: Annotated[int, Field(ge=0)] = 0  # 0 for an unlabelled data set
    class_names: list[_Text] | None = None  # by class; None if classes are only numbered
    # A file extension ("cls"), or a key of a JSON file ("json:FIELD").
    label: Annotated[str, Field(pattern=r"^([^/:A-Z]+|json:.+)$")] = "cls"
    named_labels: bool = False  # whether labels are class names instead of numbers
    # Further fields of each sample, by name; each has a file of its own, and a component.
    fields: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], FieldSpec] | None = None

    @property
    def label_component(self) -> str:
        return self.label.partition(":")[0]

    @property
    def label_field(self) -> str:
        """Key of the label in a JSON file, or ""."""
        return self.label.partition(":")[2]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError("class_names must hold a name for each of num_classes")
        if self.named_labels and not self.class_names:
            raise ValueError("named_labels need class_names")
        if self.fields is not None:
            all_fields: list[FieldSpec] = [self, *self.fields.values()]
            components = [field.component for field in all_fields]
            if None in components or len(set(components)) < len(components):
                raise ValueError("each of several fields needs a component of its own")
            if TARGET in self.fields:
                raise ValueError(f"{TARGET} is the generated field, not one of the further fields")
        return self


class Shard(BaseModel):
    """Manifest entry of one tar and its index. Sizes in bytes."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: _Name
    num_samples: _Positive
    size: _Positive
    sha256: _Digest
    index: _Name
    index_sha256: _Digest


class Manifest(SampleSpec):
    """Manifest of a data set."""

    version: int = FORMAT_VERSION  # of the format
    order_version: int = ORDER_VERSION  # version of the sample order
    num_samples: int  # in all shards
    fingerprint: _Digest  # SHA-256 (hex) of sample format and content, in order
    # Folder of the tars; None for that of the manifest. See `open_shards`.
    shards_url: OutsideUrl | None = None
    shards: list[Shard]  # in sample order


def write_manifest(
    store: Store, shards: Sequence[Shard], spec: SampleSpec, *, shards_url: str | None = None
) -> Manifest:
    """Write the manifest, which completes a data set. The tars may be in ``shards_url``."""
    manifest = Manifest(
        **_spec_values(spec),
        num_samples=sum(shard.num_samples for shard in shards),
        fingerprint=_fingerprint(spec, shards),
        shards_url=None if shards_url is None else OutsideUrl(shards_url),
        shards=list(shards),
    )
    store.publish(MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode())
    return manifest


def read_manifest(store: Store) -> Manifest:
    """Read and check the manifest in ``store``. Raises DataError and StorageError."""
    subject = f"{store.url}/{MANIFEST}"
    if not store.exists(MANIFEST):
        _raise_no_manifest(store)
    try:
        values = parse_json(store.read(MANIFEST))
        version = values["version"]
        order_version = values["order_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(subject, f"is not a manifest ({error!r})", hint=_MAKE_AGAIN) from None
    if (version, order_version) != (FORMAT_VERSION, ORDER_VERSION):
        raise DataError(
            subject,
            f"must be version {FORMAT_VERSION} with order version {ORDER_VERSION}",
            value=(version, order_version),
            hint="Use the gatdist version that wrote it, or pack or index the data again",
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        key, rule, _ = validation_problem(error)
        raise DataError(subject, f"{key}: {rule}" if key else rule, hint=_MAKE_AGAIN) from None
    if not manifest.shards:
        raise DataError(store.url, "the data set is empty", hint="Pack at least one sample")
    found = _fingerprint(manifest, manifest.shards)
    if found != manifest.fingerprint or manifest.num_samples != sum(
        s.num_samples for s in manifest.shards
    ):
        rule = f"must be {found} for the listed content: the file was changed"
        raise DataError(
            f"{subject}: fingerprint", rule, value=manifest.fingerprint, hint=_MAKE_AGAIN
        )
    return manifest


def open_shards(
    store: Store,
    manifest: Manifest,
    given: DataConfig,
    *,
    fix: str = "Set data.shards_url, and data.shards_storage_options for its credentials",
) -> Store:
    """Open the folder of a data set's tars: the user's ``given.shards_url``, or the manifest's.

    Others may have written the manifest, so it may only name a folder of its own origin, else a
    DataError with the hint ``fix`` is raised. Options of ``store`` apply to its own origin only.
    """
    if given.shards_url:
        options = options_for(given.shards_url, store.origin, given.storage_options)
        return Store(given.shards_url, options | given.shards_storage_options)
    if manifest.shards_url is None:
        return store
    try:
        return store.reach(manifest.shards_url)
    except ValueError as error:
        raise DataError(
            f"{store.url}/{MANIFEST}: shards_url",
            f"{error}, which a manifest must not choose",
            value=manifest.shards_url.shown,
            hint=f"If the shards are there: {fix}",
        ) from None


def _fingerprint(spec: SampleSpec, shards: Sequence[Shard]) -> str:
    content = [_spec_values(spec), [[s.num_samples, s.sha256] for s in shards]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _spec_values(spec: SampleSpec) -> dict[str, Any]:
    return spec.model_dump(include=set(SampleSpec.model_fields))


def _raise_no_manifest(store: Store) -> None:
    names = store.list()
    tars = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    if tars:
        rule = f"holds {len(tars)} tars such as {tars[0]} but no {MANIFEST}"
        raise DataError(store.url, rule, hint=f"Run gatdist index {store.url}")
    if names:
        rule = f"holds no shards and no {MANIFEST}"
        raise DataError(store.url, rule, hint="Check data.url, or pack data there")
    raise DataError(store.url, "does not exist or is empty", hint="Check data.url")
