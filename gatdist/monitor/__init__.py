"""What a run shows of itself: statistics, step timing, and the sinks they go to."""

from gatdist.monitor.sinks import Monitor

__all__ = ["Monitor"]
