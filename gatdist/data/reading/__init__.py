"""Reading: what to fetch when, how much of it to keep, and the cache on the host's disk."""
