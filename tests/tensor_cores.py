"""TF32 emulated on CPUs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution.default: (0, 1), aten.convolution_backward.default: (0, 1, 2)}
PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


def rounded(x):
    """Round float32 to 10 bits of mantissa, ties away from zero, as tensor cores' inputs are."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32).view_as(x)


class TensorCores(TorchDispatchMode):
    """Rounds the inputs of convolutions and products where torch's switches would on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = ()
        if torch.backends.cudnn.allow_tf32:
            places += CONVOLUTIONS.get(func, ())
        if torch.backends.cuda.matmul.allow_tf32:
            places += PRODUCTS.get(func, ())
        args = [rounded(x) if i in places else x for i, x in enumerate(args)]
        return func(*args, **(kwargs or {}))
