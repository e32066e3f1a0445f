"""Communication as an argument, and random numbers that know nothing of ranks."""
