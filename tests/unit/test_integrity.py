"""Replicas are compared at any number of workers and size of tensor."""

import pytest
import torch

from gatdist.common.errors import WorkerLostError
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.integrity import _checksum, require_equal_replicas

MULTIPLIER = 6364136223846793005


class Others(LocalCommunicator):
    """Worker 3 of a million, whose others hold ``tensors``."""

    def __init__(self, tensors):
        super().__init__(torch.device("cpu"))
        self.rank, self.world_size = 3, 10**6
        self._theirs = torch.stack([_checksum(tensors[name]) for name in sorted(tensors)])

    def broadcast_(self, tensor, source=0):
        return tensor.copy_(self._theirs)

    def all_gather(self, tensor):
        found = torch.full((self.world_size, *tensor.shape), len(self._theirs))
        found[self.rank] = tensor
        return found


@pytest.mark.parametrize("size", [0, 1, 7, 2**16, 2**16 + 1, 3 * 2**16 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_a_checksum_depends_on_each_word_and_its_place(size, dtype):
    tensor = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    word = torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8
    words = tensor.view(word).tolist()
    expected = sum((w + 1) * (2 * i + 1) for i, w in enumerate(words)) * MULTIPLIER
    found = int(_checksum(tensor))
    assert (found - expected) % 2**64 == 0
    for place in {0, size // 2, size - 1} if size else ():
        other = tensor.clone()
        other[place] = not other[place]
        assert int(_checksum(other)) != found


def test_the_first_tensor_that_differs_is_named_with_a_worker():
    mine = {f"t{number}": torch.randn(number) for number in range(9)}
    require_equal_replicas(mine, Others(mine))
    theirs = mine | {"t4": mine["t4"].clone(), "t7": mine["t7"] + 1}
    theirs["t4"][2] = 3.0
    with pytest.raises(WorkerLostError, match="worker 3 holds another t4"):
        require_equal_replicas(mine, Others(theirs))
