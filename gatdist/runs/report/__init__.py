"""A run as one page that opens anywhere: no server, no network, nothing beside the file."""

from gatdist.runs.report.page import report

__all__ = ["report"]
