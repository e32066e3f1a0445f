"""Measurements that ``gatdist bench`` makes. Nothing here is needed for training."""
