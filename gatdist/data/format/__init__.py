"""Shards on storage: WebDataset tars, an index of each, and the manifest, written last."""
