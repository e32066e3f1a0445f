"""What a run reads of each sample: that of the manifest, or what its configuration asks for."""

from __future__ import annotations

from gatdist.common.errors import DataError
from gatdist.config import DataConfig
from gatdist.data.format import Manifest, SampleSpec
from gatdist.data.modalities import MODALITIES, ReadSpec

# The keys that each kind of samples knows.
_KEYS = {
    "image": ("resolution", "channels"),
    "points": (),
    "audio": ("channels", "length"),
    "text": ("length", "vocabulary"),
    "tokens": ("length",),
}


def read_spec(manifest: Manifest, config: DataConfig, url: str) -> ReadSpec:
    """What the samples of a data set are, as they are read.

    Args:
        manifest: what there is.
        config: what is asked for.
        url: of the data set, to be named.

    Raises:
        DataError: the data set does not have that, or the configuration does not say enough.
    """
    noun = MODALITIES[manifest.modality].noun
    for key in ("resolution", "channels", "length", "vocabulary"):
        value = getattr(config, key)
        if value is not None and key not in _KEYS[manifest.modality]:
            rule = f"{url} holds {noun}s, which have none"
            raise DataError(f"data.{key}", rule, value=value, hint="Leave it out")
    shape = list(manifest.sample_shape)
    if config.channels is not None:
        shape[0] = _channels(manifest, config.channels, url)
    if config.resolution is not None:
        size = config.resolution
        shape[1:] = [size, size] if isinstance(size, int) else size
    if config.length is not None:
        longest = manifest.sample_shape[-1]
        if longest is not None and config.length > longest:
            rule = f"the {noun}s in {url} have {longest:,}"
            raise DataError(
                "data.length", rule, value=config.length, hint="Lower it, or leave it out"
            )
        shape[-1] = config.length
    found = [number for number in shape if number is not None]
    if len(found) < len(shape):
        is_image = manifest.modality == "image"
        key, what = ("resolution", "size") if is_image else ("length", "length")
        hint = f"Choose one with data.{key}"
        raise DataError(f"data.{key}", f"the {noun}s in {url} differ in {what}", hint=hint)
    message = {name: getattr(manifest, name) for name in SampleSpec.model_fields}
    message |= {"sample_shape": shape, "vocabulary": config.vocabulary}
    return ReadSpec.model_validate(message)


def resizing(manifest: Manifest, config: DataConfig, shape: tuple[int, ...]) -> str | None:
    """The filter by which pictures are resized; None where each must have its size already."""
    if manifest.modality != "image" or tuple(manifest.sample_shape[1:]) == shape[1:]:
        return None
    return config.resize


def _channels(manifest: Manifest, channels: int, url: str) -> int:
    if manifest.modality == "image":
        allowed: tuple[int | None, ...] = (1, 3)
        rule = "pictures have 1 (gray) or 3 (RGB)"
    else:
        allowed = (1, manifest.sample_shape[0])
        rule = f"the sounds in {url} can be read with 1 or {manifest.sample_shape[0]}"
    if channels not in allowed:
        raise DataError("data.channels", rule, value=channels, hint="Choose one of these")
    return channels
