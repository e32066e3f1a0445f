"""Files of one sample to arrays and back. Decoders take bytes, never a path."""

from gatdist.data.codecs.arrays import POINT_COMPONENT, decode_point, encode_point
from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.labels import LABEL_COMPONENT, decode_label
from gatdist.data.codecs.pictures import (
    FILTERS,
    IMAGE_COMPONENTS,
    decode_image,
    decode_image_into,
    encode_png,
)

__all__ = [
    "FILTERS",
    "IMAGE_COMPONENTS",
    "LABEL_COMPONENT",
    "POINT_COMPONENT",
    "CodecError",
    "decode_image",
    "decode_image_into",
    "decode_label",
    "decode_point",
    "encode_png",
    "encode_point",
]
