"""Predicted time, cost and failures of training at scales that nobody has tried yet.

``gatdist simulate SCENARIO.toml``: a scenario (:mod:`~gatdist.simulate.scenario`) holds what was
measured, observed or published; :mod:`~gatdist.simulate.step` is the model of a step,
:mod:`~gatdist.simulate.fit` finds what of it was not told, :mod:`~gatdist.simulate.faults` plays
whole runs. Nothing here needs torch or Ray.
"""
