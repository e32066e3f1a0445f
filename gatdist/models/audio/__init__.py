"""Networks for sounds. Importing this package registers them."""

from gatdist.models.audio import log_mel, wavegan

__all__ = ["log_mel", "wavegan"]
