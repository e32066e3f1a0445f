"""``gatdist simulate``: predict time, cost and failures; needs neither torch nor Ray."""
