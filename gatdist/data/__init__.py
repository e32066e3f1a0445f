"""Data: shards on any storage, read in an order that depends on seed and position only."""
