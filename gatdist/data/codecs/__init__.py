"""Encoders and decoders of sample files. They take bytes, never a path."""

from gatdist.data.codecs.arrays import (
    decode_point_into,
    decode_tokens_into,
    encode_array,
    read_npy,
)
from gatdist.data.codecs.audio import (
    AUDIO_EXTENSIONS,
    decode_audio_into,
    encode_wav,
    read_audio,
    read_audio_header,
)
from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.formats import IMAGE_COMPONENTS, UNSUPPORTED_IMAGES, unsupported_image
from gatdist.data.codecs.images import (
    FILTERS,
    ImageHeader,
    change_image,
    decode_image_into,
    decode_pixels,
    encode_png,
    read_image_header,
    read_image_shape,
)
from gatdist.data.codecs.labels import (
    LABEL_COMPONENT,
    MAX_CLASSES,
    Label,
    decode_label,
    is_printable,
    normalized,
    read_label,
)
from gatdist.data.codecs.text import Vocabulary, decode_text_into

__all__ = [
    "AUDIO_EXTENSIONS",
    "FILTERS",
    "IMAGE_COMPONENTS",
    "LABEL_COMPONENT",
    "MAX_CLASSES",
    "UNSUPPORTED_IMAGES",
    "CodecError",
    "ImageHeader",
    "Label",
    "Vocabulary",
    "change_image",
    "decode_audio_into",
    "decode_image_into",
    "decode_label",
    "decode_pixels",
    "decode_point_into",
    "decode_text_into",
    "decode_tokens_into",
    "encode_array",
    "encode_png",
    "encode_wav",
    "is_printable",
    "normalized",
    "read_audio",
    "read_audio_header",
    "read_image_header",
    "read_image_shape",
    "read_label",
    "read_npy",
    "unsupported_image",
]
