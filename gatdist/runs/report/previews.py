"""The previews of a run's samples, subsampled and downscaled to fit into a page."""

from __future__ import annotations

import base64
import io
import re
import warnings
from html import escape

import numpy as np
from PIL import Image

from gatdist.common.errors import GatdistError
from gatdist.monitor.numbers import count, size
from gatdist.storage import Store

_NAME = re.compile(r"(?:fakes-(\d{1,15})|reals)\.(png|wav|txt)")
_MAX_PREVIEWS = {"txt": 16, "wav": 6, "png": 16}  # in the order shown
_MAX_PIXELS = 1000
_MIN_PIXELS = 200
_SMALL_PIXELS = 640  # smaller images are shown without interpolation
_MAX_IMAGE_BYTES = 400_000
_MAX_AUDIO_BYTES = 2_500_000
_MAX_TEXT = 6000
_QUALITY = 85


def previews(store: Store, names: list[str], lacks: list[str]) -> list[tuple[int | None, str]]:
    """Return HTML of real samples (None), then of generated ones by ``samples_seen``.

    ``lacks`` gets messages of what can't be shown.
    """
    found: dict[int | None, str] = {}
    for ending, most in _MAX_PREVIEWS.items():
        parsed = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
        fakes = {int(m[1]): name for m, name in parsed if m[2] == ending and m[1]}
        chosen: list[tuple[int | None, str]]
        chosen = [(None, name) for m, name in parsed if m[2] == ending and not m[1]]
        chosen += [(seen, fakes[seen]) for seen in spread(sorted(fakes), most)]
        for seen, name in chosen:
            if shown := _shown(store, name, lacks):
                found[seen] = found.get(seen, "") + shown
    return sorted(found.items(), key=lambda item: -1 if item[0] is None else item[0])


def spread(items: list[int], most: int) -> list[int]:
    """Return at most ``most`` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _shown(store: Store, name: str, lacks: list[str]) -> str:
    try:
        content = store.read(name)
        if name.endswith(".png"):
            return _image(name, content)
        if name.endswith(".wav"):
            return _audio(name, content)
        text = content.decode(errors="replace")
        cut = len(text) - _MAX_TEXT
        more = f"…\n({count(cut)} more characters)" if cut > 0 else ""
        return f"<pre>{escape(text[:_MAX_TEXT] + more)}</pre>"
    except (GatdistError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        lacks.append(f"samples/{name} can't be shown ({str(error) or type(error).__name__})")
        return ""


def _image(name: str, content: bytes) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            kind = "small" if max(image.size) <= _SMALL_PIXELS else "large"
            if max(image.size) <= _MAX_PIXELS and len(content) <= _MAX_IMAGE_BYTES:
                source = _data("image/png", content)
            else:
                source = _data("image/webp", _smaller(image.convert("RGB")))
    return f'<img class="{kind}" alt="{escape(name)}" src="{source}">'


def _smaller(image: Image.Image) -> bytes:
    """Downscale until it fits, in pixels and bytes."""
    side, content = _MAX_PIXELS, b""
    while not content or (len(content) > _MAX_IMAGE_BYTES and side > _MIN_PIXELS):
        image.thumbnail((side, side))
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=_QUALITY)
        content, side = encoded.getvalue(), side * 2 // 3
    return content


def _audio(name: str, content: bytes) -> str:
    if content[:4] != b"RIFF":
        raise ValueError("not a WAV file")
    if len(content) > _MAX_AUDIO_BYTES:
        raise ValueError(f"it has {size(len(content))}, the limit is {size(_MAX_AUDIO_BYTES)}")
    source = _data("audio/wav", content)
    return f'<audio controls preload="metadata" title="{escape(name)}" src="{source}"></audio>'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
