"""Predict time, cost and failures of training at scales that were not measured.

``gatdist simulate SCENARIO.toml``: ``scenario`` holds what was measured, observed or published;
``step`` is the model of a step, ``fit`` estimates its unknown parameters, and ``faults`` simulates
whole runs. Nothing here needs torch or Ray.
"""
