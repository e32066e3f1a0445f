"""The only user of Ray: launching workers, and checking a machine before it trains."""

from gatdist.cluster.launch import fit

__all__ = ["fit"]
