"""What a run has shown of its samples, thinned until it fits into a page."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image

from gatdist.common.errors import GatdistError
from gatdist.monitor.numbers import count, size
from gatdist.storage import Store

_NAME = re.compile(r"(?:fakes-(\d{1,15})|reals)\.(png|wav|txt)")
_MOST_CLOCKS = {"txt": 16, "wav": 6, "png": 16}  # the most telling kind first
_MOST_PIXELS = 1000
_LEAST_PIXELS = 200
_SMALL_PIXELS = 640  # enlarged, they are shown pixel by pixel
_MAX_IMAGE_BYTES = 400_000
_MAX_AUDIO_BYTES = 2_500_000
_MOST_TEXT = 6000
_QUALITY = 85


@dataclass
class Preview:
    """Samples of one clock, or real ones, as HTML.

    Attributes:
        clock: samples seen; None of real ones.
        html: picture, player or text.
    """

    clock: int | None
    html: list[str] = field(default_factory=list)


def previews(store: Store, names: list[str], lacks: list[str]) -> list[Preview]:
    """Real samples first, then fakes of some clocks from the first to the last.

    Args:
        store: the folder ``samples`` of a run.
        names: of the files in it.
        lacks: what can't be shown is added.
    """
    found: dict[int | None, Preview] = {}
    for ending, most in _MOST_CLOCKS.items():
        parsed = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
        clocks = {int(m[1]): name for m, name in parsed if m[2] == ending and m[1]}
        chosen: list[tuple[int | None, str]]
        chosen = [(None, name) for m, name in parsed if m[2] == ending and not m[1]]
        chosen += [(clock, clocks[clock]) for clock in spread(sorted(clocks), most)]
        for clock, name in chosen:
            shown = _shown(store, name, lacks)
            if shown:
                found.setdefault(clock, Preview(clock)).html.append(shown)
    return sorted(found.values(), key=lambda one: -1 if one.clock is None else one.clock)


def spread(items: list[int], most: int) -> list[int]:
    """At most so many, evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _shown(store: Store, name: str, lacks: list[str]) -> str:
    """A file as HTML; "" where it can't be shown."""
    try:
        content = store.read(name)
        if name.endswith(".png"):
            return _image(name, content)
        if name.endswith(".wav"):
            return _audio(name, content)
        return f"<pre>{escape(_cut(content.decode(errors='replace')))}</pre>"
    except (GatdistError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        lacks.append(f"samples/{name} can't be shown ({str(error) or type(error).__name__})")
        return ""


def _image(name: str, content: bytes) -> str:
    """A picture as it is, or smaller where it is large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            kind = "small" if max(image.size) <= _SMALL_PIXELS else "large"
            if max(image.size) <= _MOST_PIXELS and len(content) <= _MAX_IMAGE_BYTES:
                source = _data("image/png", content)
            else:
                source = _data("image/webp", _smaller(image.convert("RGB")))
    return f'<img class="{kind}" alt="{escape(name)}" src="{source}">'


def _smaller(image: Image.Image) -> bytes:
    """As large as it may be, in pixels and bytes."""
    side, content = _MOST_PIXELS, b""
    while not content or (len(content) > _MAX_IMAGE_BYTES and side > _LEAST_PIXELS):
        image.thumbnail((side, side))
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=_QUALITY)
        content, side = encoded.getvalue(), side * 2 // 3
    return content


def _audio(name: str, content: bytes) -> str:
    if content[:4] != b"RIFF":
        raise ValueError("no WAV file")
    if len(content) > _MAX_AUDIO_BYTES:
        raise ValueError(f"it has {size(len(content))}, a page takes {size(_MAX_AUDIO_BYTES)}")
    source = _data("audio/wav", content)
    return f'<audio controls preload="metadata" title="{escape(name)}" src="{source}"></audio>'


def _cut(text: str) -> str:
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]}…\n({count(len(text) - _MOST_TEXT)} more characters)"


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
