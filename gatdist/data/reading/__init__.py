"""Reading: what a worker will need is fetched ahead, in pieces, and kept no longer than needed."""
