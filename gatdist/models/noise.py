"""Networks that are random beside their inputs.

Such a network says by ``noise_size: int`` how many numbers it takes of each sample, and its forward
takes them as a last argument: standard normal, [n, noise_size]. The system draws them by the
sample's position in the run, so that the result does not depend on who computes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def uniform(normal: Tensor) -> Tensor:
    """Numbers uniform in (0, 1) from standard normal ones, one for one."""
    smallest = torch.finfo(normal.dtype).eps
    share = 0.5 + 0.5 * torch.erf(normal * math.sqrt(0.5))
    return share.clamp(smallest, 1 - smallest)


def gumbel(normal: Tensor) -> Tensor:
    """Numbers of Gumbel's distribution from standard normal ones, one for one."""
    return -torch.log(-torch.log(uniform(normal)))
