"""Files at any URL: read in ranges, published whole, tried again when a failure is a passing one.

``store`` is what the rest of gatdist uses; ``backends`` opens fsspec's file systems so that they
leave retrying to it; ``failures`` tells what an error of theirs means; ``local`` is this machine.
"""

from gatdist.storage.local import unfinished
from gatdist.storage.store import Store, at_file
from gatdist.storage.urls import absolute

__all__ = ["Store", "absolute", "at_file", "unfinished"]
