"""Files at any URL: read in ranges, published atomically, with retries of transient failures."""

from gatdist.storage.store import Store

__all__ = ["Store"]
