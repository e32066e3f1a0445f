"""Copies to and from a GPU: batches on a stream of their own, and snapshots of a state."""

import pytest
import torch

from gatdist.data.loader import Batch
from gatdist.runs.checkpoints import Snapshots
from gatdist.training.copies import Copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


def test_copied_batches_hold_what_was_loaded():
    """Also while the device computes, and memory of earlier batches is reused."""
    copies = Copies(CUDA)
    weight = torch.randn(4096, 4096, device=CUDA)
    memory = [torch.empty(64, 64, 64, 3, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    sums = []
    for step in range(20):
        samples = memory[step % 2].fill_(step)
        numbers = torch.full((64,), step).pin_memory()
        copied = copies(Batch(samples, None, numbers))
        weight = weight @ weight / weight.norm()
        sums.append((copied.samples.long().sum(), copied.positions.sum()))
    expected = [(step * 64 * 64 * 64 * 3, step * 64) for step in range(20)]
    assert [(int(a), int(b)) for a, b in sums] == expected


def test_snapshots_are_copies_in_the_same_page_locked_memory():
    snapshots = Snapshots()
    tensor = torch.randn(8, 3, 16, 16, device=CUDA).contiguous(memory_format=torch.channels_last)
    first = snapshots.take({"x": tensor})["x"]
    assert first.is_pinned()
    assert first.equal(tensor.cpu())
    tensor.zero_()
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    second = snapshots.take({"x": tensor})["x"]
    assert second.data_ptr() == first.data_ptr()
    assert not second.any()
    assert torch.cuda.max_memory_allocated(CUDA) == before
