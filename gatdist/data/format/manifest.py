"""The manifest of a data set: what it is, and which shards it has."""

from __future__ import annotations

import hashlib
import json
import unicodedata
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
from gatdist.common.strict_json import parse_json
from gatdist.config import DataConfig
from gatdist.data.order import ORDER_VERSION
from gatdist.storage import OutsideUrl, Store, options_for

MANIFEST = "manifest.json"
FORMAT_VERSION = 2

_MAKE_AGAIN = "Pack or index the data again"

Modality = Literal["image", "points", "audio", "text", "tokens"]

_UNFIT = ("Cc", "Cs", "Zl", "Zp")  # control characters, unpaired surrogates, ends of lines

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Sums of these must fit in 64 bits.
_Positive = Annotated[int, Field(gt=0, lt=2**48)]


def fits_manifest(name: str) -> bool:
    """Whether a shard may have this name: it leads nowhere else, and can be printed and encoded."""
    is_inside = not any(part in ("", ".", "..") for part in name.split("/"))
    return is_inside and not any(unicodedata.category(c) in _UNFIT for c in name)


def _inside(name: str) -> str:
    """A shard's name comes from a file that others may have written."""
    if not fits_manifest(name):
        raise ValueError("must be the name of a file in the folder, or in one below it")
    return name


def _text(value: str) -> str:
    value.encode()  # raises ValueError of half a character, which JSON may hold
    return value


_Name = Annotated[str, AfterValidator(_inside)]
_Text = Annotated[str, AfterValidator(_text)]


class SampleSpec(BaseModel):
    """What the samples of a data set are.

    Attributes:
        modality: ``image``, ``points`` (arrays of numbers), ``audio``, ``text`` or ``tokens``.
        sample_shape: (C, H, W) of images, that of points, (C, n) of sounds, (n,) bytes of texts,
            (n,) tokens. H and W, or n, are None where the samples differ in them.
        bits: of each channel of images as they are read, 8 or 16.
        component: the ending of each sample's file; None for any that the modality has.
        sample_rate: of sounds, in hertz.
        num_tokens: of the vocabulary of tokens.
        num_classes: 0 where there are no labels.
        class_names: of each class, where they have names.
        label: where the class of a sample is: an ending (``cls``), or a field of a JSON file
            (``json:FIELD``).
        named_labels: whether it holds the name of the class, instead of its number.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    modality: Modality
    sample_shape: list[_Positive | None]
    bits: Literal[8, 16] = 8
    component: Annotated[str, Field(pattern=r"^[^/A-Z]+$")] | None = None
    sample_rate: _Positive | None = None
    num_tokens: _Positive | None = None
    num_classes: Annotated[int, Field(ge=0)] = 0
    class_names: list[_Text] | None = None
    label: Annotated[str, Field(pattern=r"^([^/:A-Z]+|json:.+)$")] = "cls"
    named_labels: bool = False

    @property
    def label_component(self) -> str:
        """The ending of the file that holds the label."""
        return self.label.partition(":")[0]

    @property
    def label_field(self) -> str:
        """The field of the JSON file that holds it, or ""."""
        return self.label.partition(":")[2]

    @model_serializer(mode="wrap")
    def _without_usual_bits(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Data sets of 8 bits keep the manifest and the fingerprint that they always had."""
        message: dict[str, Any] = write(self)
        if self.bits == 8:
            message.pop("bits", None)
        return message

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        shape, modality = self.sample_shape, self.modality
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
                raise ValueError("the sample_shape of points must hold whole numbers")
        elif modality == "audio":
            if len(shape) != 2 or shape[0] is None or self.sample_rate is None:
                raise ValueError(
                    "sounds need a sample_rate, and the sample_shape [channels, length]"
                )
        elif len(shape) != 1 or (modality == "tokens" and self.num_tokens is None):
            raise ValueError("texts need the sample_shape [length], and tokens num_tokens")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError("class_names must hold a name for each of num_classes")
        if self.named_labels and not self.class_names:
            raise ValueError("named_labels need class_names")
        return self


class Shard(BaseModel):
    """One tar and its index, as the manifest tells them. Sizes in bytes."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: _Name
    num_samples: _Positive
    size: _Positive
    sha256: _Digest
    index: _Name
    index_sha256: _Digest


class Manifest(SampleSpec):
    """What a data set is.

    Attributes:
        version: of the format.
        order_version: of the order of samples that it was made for.
        num_samples: in all shards.
        fingerprint: SHA-256 (hex) over all content, in its order.
        shards_url: where the tars are; None beside the manifest. See :func:`open_shards`.
        shards: in the order of their samples.
    """

    version: int = FORMAT_VERSION
    order_version: int = ORDER_VERSION
    num_samples: int
    fingerprint: _Digest
    shards_url: OutsideUrl | None = None
    shards: list[Shard]


def write_manifest(
    store: Store, shards: Sequence[Shard], spec: SampleSpec, *, shards_url: str | None = None
) -> Manifest:
    """Turn a folder of finished shards into a data set.

    Args:
        store: the folder.
        shards: in the order of their samples.
        spec: what the samples are.
        shards_url: where the tars are, if not beside the manifest.
    """
    manifest = Manifest(
        **_reported(spec),
        num_samples=sum(shard.num_samples for shard in shards),
        fingerprint=_fingerprint(spec, shards),
        shards_url=None if shards_url is None else OutsideUrl(shards_url),
        shards=list(shards),
    )
    store.publish(MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode())
    return manifest


def read_manifest(store: Store) -> Manifest:
    """Read and check the manifest of the data set in ``store``.

    Raises:
        DataError: there is none, or it is damaged, of an unknown version, or of no samples.
        StorageError: the folder may not be read.
    """
    subject = f"{store.url}/{MANIFEST}"
    if not store.exists(MANIFEST):
        _raise_no_manifest(store)
    try:
        values = parse_json(store.read(MANIFEST))
        version = values["version"]
        order_version = values["order_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(subject, f"is no manifest ({error!r})", hint=_MAKE_AGAIN) from None
    if (version, order_version) != (FORMAT_VERSION, ORDER_VERSION):
        raise DataError(
            subject,
            f"this gatdist reads version {FORMAT_VERSION} with order version {ORDER_VERSION}",
            value=(version, order_version),
            hint="Use the gatdist that wrote it, or pack or index the data again",
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise DataError(subject, message, hint=_MAKE_AGAIN) from None
    if not manifest.shards:
        raise DataError(store.url, "the data set is empty", hint="Pack at least one sample")
    found = _fingerprint(manifest, manifest.shards)
    if found != manifest.fingerprint or manifest.num_samples != sum(
        s.num_samples for s in manifest.shards
    ):
        rule = f"was changed after it was written; what it lists has the fingerprint {found}"
        raise DataError(
            f"{subject}: fingerprint", rule, value=manifest.fingerprint, hint=_MAKE_AGAIN
        )
    return manifest


def open_shards(
    store: Store,
    manifest: Manifest,
    given: DataConfig,
    *,
    fix: str = "Set data.shards_url, and data.shards_storage_options where they need credentials",
) -> Store:
    """Open the folder of a data set's tars.

    The manifest was written by others: it may name another folder of its own origin, and nothing
    else. What the user names takes precedence.

    Args:
        store: of the manifest.
        manifest: what is there.
        given: by the user: ``shards_url``, and storage options, of which those of the store are
            used for ``shards_url`` too where both are of one origin.
        fix: how the user names another origin.

    Raises:
        DataError: the manifest names another origin.
        StorageError: the URL can't be used.
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
            f"{error}, and the manifest alone doesn't decide where requests go",
            value=manifest.shards_url.shown,
            hint=f"If that is where the shards are: {fix}",
        ) from None


def _fingerprint(spec: SampleSpec, shards: Sequence[Shard]) -> str:
    """Over what the samples are and the content of shards; not over where they lie."""
    content = [_reported(spec), [[s.num_samples, s.sha256] for s in shards]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _reported(spec: SampleSpec) -> dict[str, Any]:
    return spec.model_dump(include=set(SampleSpec.model_fields))


def _raise_no_manifest(store: Store) -> None:
    names = store.list()
    tars = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    if tars:
        raise DataError(
            store.url,
            f"holds {len(tars)} tars such as {tars[0]} but no {MANIFEST}",
            hint=f"Run gatdist index {store.url}",
        )
    if names:
        raise DataError(
            store.url,
            f"holds no shards and no {MANIFEST}",
            hint="Check data.url, or pack the data there",
        )
    raise DataError(store.url, "does not exist or is empty", hint="Check data.url")
