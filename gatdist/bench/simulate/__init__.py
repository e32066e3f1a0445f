"""``gatdist simulate``: predict time, cost and failures at scales that were not measured.

A ``scenario`` holds measured, observed or published figures; ``model`` computes a step, ``fit``
estimates its unknown parameters, and ``faults`` simulates runs. Needs neither torch nor Ray.
"""
