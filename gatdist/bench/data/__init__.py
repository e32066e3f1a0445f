"""How fast data is read: ``local`` from this machine, ``remote`` from object storage far away."""
