"""Is this machine, or a cluster, fit to train?

``local`` looks at the machine it runs on, with or without Ray, ``storage`` at storage from there.
``cluster`` does both on every host of a cluster, through the actor of ``probe``, which measures the
network with ``network``. ``verdicts`` says what the facts mean, and ``report`` shows it.
"""
