"""Checks whether this machine (``local``) or every host of a cluster (``cluster``) can train."""
