"""The only user of Ray: launches workers (``launch``), and checks a machine (``doctor``)."""
