"""Compile the kernels of gatdist.nn.fused for GPUs that are not here, and report what they use.

``python compile_kernels.py all 80 90`` prints a JSON object by kernel, arguments and architecture;
with ``some``, for bfloat16 and channels last.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from gatdist.nn import fused, kernels

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


class Compiled:
    """Stands for the module of kernels: a launch compiles the kernel, as Triton would."""

    def __init__(self, architectures):
        self.architectures, self.found = architectures, {}

    def __getattr__(self, name):
        kernel = getattr(kernels, name)

        class Launcher:
            def __getitem__(launcher, grid):
                return lambda *args, **constants: self.compile(name, kernel, args, constants)

        return Launcher()

    def compile(self, name, kernel, args, constants):
        signature, constants, attributes = {}, dict(constants), {}
        for i, (parameter, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            specializes = parameter not in (kernel.do_not_specialize or ())
            if value is None or (type(value) is int and value == 1 and specializes):
                constants[parameter] = value
                continue
            if isinstance(value, Tensor):
                signature[parameter] = TYPES[value.dtype]
            else:
                signature[parameter] = "i32" if type(value) is int else "fp32"
            aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
            if aligned and specializes:
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        signature = {p: signature[p] for p in kernel.arg_names}
        for architecture in self.architectures:
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            types = " ".join(s for s in signature.values() if s.startswith("*"))
            tile = " ".join(f"{k}={v}" for k, v in constants.items() if k.isupper())
            key = f"{name} sm_{architecture} {types} {tile}"
            self.found[key] = resources(compiled)


def resources(compiled):
    """Return registers, spilled bytes and shared memory, from ptxas."""
    ptxas = get_ptxas(compiled.metadata.target.arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        name = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        command = [ptxas, "-v", f"--gpu-name={name}", source, "-o", Path(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    numbers = {
        "registers": r"Used (\d+) registers",
        "spilled": r"(\d+) bytes spill stores",
    }
    found = {k: int(re.search(p, done.stderr)[1]) for k, p in numbers.items()}
    return found | {"shared": compiled.metadata.shared}


def launch(dtypes, layouts):
    """Launch every kernel as the networks do: types, layouts, optional arguments."""
    positions = torch.zeros(4, dtype=torch.int64)
    fused.philox(positions, 3, 2**32 - 1, 5, 6)
    for dtype in dtypes:
        for last in layouts:
            launch_on_images(dtype, last)
        if dtype != torch.float32:
            launch_products(dtype)
    launch_on_one_number(torch.empty(1, 1, 1, 1))


def launch_on_images(dtype, last):
    x = fused.laid_out(torch.empty(2, 64, 32, 32, dtype=dtype), last)
    odd = fused.laid_out(torch.empty(2, 3, 33, 31, dtype=dtype), last)
    bias, scale = torch.empty(64), torch.empty(2, 64)
    noise, strength = torch.empty(2, 1, 32, 32), torch.empty(())
    _, signs = fused.activate(x, None, bias, None, None, 0.2, 1.0, True)
    fused.activate(x, scale, bias, noise, strength, 0.2, 1.0, True)
    fused.activate(odd, None, torch.empty(3), None, None, 0.2, 1.0, False)
    fused.activate_gradient(x, signs, None, None, None, 0.2, 1.0, False)
    fused.activate_gradient(x, signs, None, None, None, 0.2, 1.0, True)
    fused.activate_gradient(x, signs, x, scale, noise, 0.2, 1.0, True)
    for image in (x, odd):
        fused.fir(image, 1, 1, 2, 2, 1.0)
        fused.fir(image, 1, 2, 1, 1, 1.0)
        fused.fir(image, 2, 1, 2, 1, 4.0)


def launch_on_one_number(x):
    """Sizes of 1 are constants in compiled kernels."""
    _, signs = fused.activate(x, x[0, 0], x.flatten(), x, x[0, 0, 0, 0], 0.2, 1.0, True)
    fused.activate_gradient(x, signs, x, x[0, 0], x, 0.2, 1.0, True)
    fused.fir(x, 2, 1, 2, 1, 4.0)
    fused.philox(torch.zeros(1, dtype=torch.int64), 1, 0, 5, 6)


def launch_products(dtype):
    x = fused.laid_out(torch.empty(2, 96, 16, 16, dtype=dtype), True)
    weight, bias = torch.empty(192, 96, 1, 1, dtype=dtype), torch.empty(192)
    y, signs, _ = fused.pointwise(x, weight, bias, None, None, 0.2, 1.0, True, False)
    back = weight.transpose(0, 1)
    fused.pointwise(y, back, None, x, None, 1.0, 1.0, False, False)
    fused.pointwise(x, weight, None, None, signs, 0.2, 1.0, False, True)


def main():
    compiled = Compiled([int(number) for number in sys.argv[2:]])
    fused._kernels = lambda: compiled
    if sys.argv[1] == "all":
        launch((torch.float32, torch.float16, torch.bfloat16), (False, True))
    else:
        launch((torch.bfloat16,), (True,))
    json.dump(compiled.found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
