"""Networks for images [n, C, H, W]. Importing this package registers them."""

from gatdist.models.image import biggan, dcgan, r3gan, residual, sngan, stylegan2, translation

__all__ = ["biggan", "dcgan", "r3gan", "residual", "sngan", "stylegan2", "translation"]
