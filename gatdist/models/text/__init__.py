"""Networks for texts. Importing this package registers them.

A text is one-hot, [V, t]: of each of t places, which of V characters stands there; the first of
them means that the text has ended. Generators give probabilities, or one-hot numbers that let
gradients through.
"""

from gatdist.models.text import convolutional, recurrent

__all__ = ["convolutional", "recurrent"]
