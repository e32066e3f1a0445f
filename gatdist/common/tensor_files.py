"""Reading of safetensors files, which may be damaged or hostile."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor


def read_safetensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU. Raises ValueError if it is none."""
    try:
        return load(content)
    except KeyError as error:
        raise ValueError(f"numbers of an unknown format, {error}") from None
    except (SafetensorError, TypeError, RuntimeError) as error:  # of sizes that torch can't hold
        raise ValueError(str(error).splitlines()[0]) from None
