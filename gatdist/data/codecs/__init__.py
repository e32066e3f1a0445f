"""Files of one sample to arrays and back. Decoders take bytes, never a path."""

from gatdist.data.codecs.arrays import (
    POINT_COMPONENT,
    decode_point,
    decode_point_into,
    encode_array,
    read_npy,
)
from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.formats import (
    IMAGE_COMPONENTS,
    UNSUPPORTED_IMAGES,
    unsupported_image,
)
from gatdist.data.codecs.headers import ImageHeader, read_image_header, read_image_shape
from gatdist.data.codecs.labels import (
    LABEL_COMPONENT,
    MOST_CLASSES,
    Label,
    decode_label,
    normalized,
    read_label,
)
from gatdist.data.codecs.pictures import (
    FILTERS,
    DecodedImage,
    change_image,
    decode_image,
    decode_image_into,
    decode_pixels,
    encode_png,
)
from gatdist.data.codecs.sounds import (
    SOUND_COMPONENTS,
    SoundHeader,
    decode_sound,
    decode_sound_into,
    encode_wav,
    read_sound,
    read_sound_header,
)
from gatdist.data.codecs.texts import (
    MOST_CHARACTERS,
    TEXT_COMPONENT,
    Vocabulary,
    decode_text,
    decode_text_into,
)
from gatdist.data.codecs.tokens import TOKENS_COMPONENT, decode_tokens, decode_tokens_into

__all__ = [
    "FILTERS",
    "IMAGE_COMPONENTS",
    "LABEL_COMPONENT",
    "MOST_CHARACTERS",
    "MOST_CLASSES",
    "POINT_COMPONENT",
    "SOUND_COMPONENTS",
    "TEXT_COMPONENT",
    "TOKENS_COMPONENT",
    "UNSUPPORTED_IMAGES",
    "CodecError",
    "DecodedImage",
    "ImageHeader",
    "Label",
    "SoundHeader",
    "Vocabulary",
    "change_image",
    "decode_image",
    "decode_image_into",
    "decode_label",
    "decode_pixels",
    "decode_point",
    "decode_point_into",
    "decode_sound",
    "decode_sound_into",
    "decode_text",
    "decode_text_into",
    "decode_tokens",
    "decode_tokens_into",
    "encode_array",
    "encode_png",
    "encode_wav",
    "normalized",
    "read_image_header",
    "read_image_shape",
    "read_label",
    "read_npy",
    "read_sound",
    "read_sound_header",
    "unsupported_image",
]
