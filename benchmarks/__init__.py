"""Measurements. Each case runs by itself; what it finds goes to ``results/``."""
