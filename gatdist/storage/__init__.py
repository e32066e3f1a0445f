"""Files at any URL: read in ranges, published atomically, with retries of transient failures."""

from gatdist.storage.backends import redact_secrets, secrets_of
from gatdist.storage.local import unfinished
from gatdist.storage.store import Store, at_file
from gatdist.storage.urls import (
    LOCAL,
    OutsideUrl,
    absolute,
    options_for,
    origin,
    without_credentials,
)

__all__ = [
    "LOCAL",
    "OutsideUrl",
    "Store",
    "absolute",
    "at_file",
    "options_for",
    "origin",
    "redact_secrets",
    "secrets_of",
    "unfinished",
    "without_credentials",
]
