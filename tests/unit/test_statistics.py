"""Statistics: every added value is reported once, and adding never waits for the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fake_communicator import FakeCommunicator
from gatdist.monitor.statistics import Statistics
from gatdist.parallel.communicator import LocalCommunicator

CPU = torch.device("cpu")


class CountingCommunicator(LocalCommunicator):
    def __init__(self):
        super().__init__(CPU)
        self.collectives = 0

    def all_reduce_(self, tensor):
        self.collectives += 1
        return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shapes", [[()], [(7,)], [(2, 3), (), (5,)], [(4, 1, 3)] * 10])
def test_means_are_those_of_all_values_together(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(-99, 99, shape, generator=generator).to(dtype) for shape in shapes]
    statistics = Statistics(CPU)
    for tensor in tensors:
        statistics.add("x", tensor)
    together = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
    mean = statistics.reduce(LocalCommunicator(CPU))["x"]
    assert mean == pytest.approx(together.mean(), rel=1e-12)


def test_sums_keep_digits_that_float32_would_lose():
    statistics = Statistics(CPU)
    statistics.add("many", torch.full((1_000_000,), 0.1))
    means = statistics.reduce(LocalCommunicator(CPU))
    assert means["many"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_all_names_are_reduced_in_one_collective_and_then_reset():
    statistics, comm = Statistics(CPU), CountingCommunicator()
    for name in ("b", "a", "c"):
        statistics.add(name, torch.tensor([1.0, 2.0]))
    assert statistics.reduce(comm) == {"a": 1.5, "b": 1.5, "c": 1.5}
    assert comm.collectives == 1
    assert statistics.reduce(comm) == {}
    statistics.add("a", torch.tensor(4.0))
    assert statistics.reduce(comm) == {"a": 4.0}


def test_workers_are_weighted_by_their_counts():
    statistics = Statistics(CPU)
    statistics.add("x", torch.tensor([1.0, 3.0]))
    assert statistics.reduce(FakeCommunicator(1, 3)) == {"x": 2.0}


def test_adding_does_not_synchronize_with_the_device():
    meta = torch.device("meta")  # a device without values: reading one raises
    statistics = Statistics(meta)
    for _ in range(3):
        statistics.add("x", torch.empty(4, 5, device=meta))
    with pytest.raises((NotImplementedError, RuntimeError)):
        statistics.reduce(LocalCommunicator(meta))


def test_gradients_and_the_callers_tensor_are_unchanged():
    values = torch.ones(3, requires_grad=True)
    statistics = Statistics(CPU)
    statistics.add("x", values * 2)
    statistics.add("x", values * 2)
    assert statistics.reduce(LocalCommunicator(CPU)) == {"x": 2.0}
    assert values.grad is None
    assert values.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_value_does_not_hide_the_others(bad):
    statistics = Statistics(CPU)
    statistics.add("x", torch.tensor([1.0, bad, 3.0]))
    statistics.add("only bad", torch.tensor(bad))
    statistics.add("none", torch.empty(0))
    assert statistics.reduce(LocalCommunicator(CPU)) == {"x": 2.0}


@pytest.mark.gpu
def test_adding_on_cuda_never_synchronizes():
    device = torch.device("cuda", 0)
    statistics, values = Statistics(device), torch.ones(1000, device=device)
    statistics.add("x", values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics.add("x", values)
        statistics.add("y", values.half())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert statistics.reduce(LocalCommunicator(device)) == {"x": 1.0, "y": 1.0}
