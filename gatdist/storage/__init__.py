"""Files at any URL: read in ranges, published whole, tried again when a failure is a passing one.

``store`` is what the rest of gatdist uses; ``origin`` says where credentials may go; ``backends``
opens fsspec's file systems so that they leave retrying to it; ``failures`` tells what an error of
theirs means; ``local`` is this machine.
"""

from gatdist.storage.backends import secrets_of, without
from gatdist.storage.local import unfinished
from gatdist.storage.origin import LOCAL, OutsideUrl, options_for, origin, without_credentials
from gatdist.storage.store import Store, at_file
from gatdist.storage.urls import absolute

__all__ = [
    "LOCAL",
    "OutsideUrl",
    "Store",
    "absolute",
    "at_file",
    "options_for",
    "origin",
    "secrets_of",
    "unfinished",
    "without",
    "without_credentials",
]
