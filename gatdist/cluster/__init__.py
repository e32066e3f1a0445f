"""The only user of Ray.

Launching workers (:mod:`.launch`), and checking a machine (:mod:`.doctor`).
"""
