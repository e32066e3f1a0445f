"""What a run shows of itself: statistics, step timing, and the sinks they go to."""
