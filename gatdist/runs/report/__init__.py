"""A run as one self-contained HTML page: no server, no network, no other files."""

from gatdist.runs.report.page import report

__all__ = ["report"]
