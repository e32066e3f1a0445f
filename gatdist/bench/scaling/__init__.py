"""``gatdist bench scaling``: efficiency by number of workers, and recovery time after a failure."""
