"""Which files a checkpoint has, and who writes and reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatdist.runs import sharding
from gatdist.runs.sharding import group_of, is_sharded, layout, layout_of_each, shares

LIMIT = 100
NAMES = st.tuples(st.sampled_from(["generator", "optimizer_generator", "average"]), st.integers())
SIZES = st.dictionaries(
    NAMES.map(lambda pair: f"{pair[0]}/{pair[1]}"), st.integers(0, 2 * LIMIT), max_size=40
)
FILES = st.dictionaries(st.integers().map(str), st.integers(0, 3 * LIMIT), max_size=40)


@pytest.fixture(autouse=True, scope="module")
def _small_files():
    before, sharding.FILE_BYTES = sharding.FILE_BYTES, LIMIT
    yield
    sharding.FILE_BYTES = before


@given(SIZES)
def test_each_tensor_is_in_one_file_of_its_group(sizes):
    files = layout(sizes)
    assert sorted(name for names in files.values() for name in names) == sorted(sizes)
    for file, names in files.items():
        assert {name.partition("/")[0] for name in names} == {group_of(file)}
        assert len(names) == 1 or sum(sizes[name] for name in names) <= LIMIT


def test_files_are_named_as_those_of_large_models():
    sizes = {"average/a": 60, "average/b": 60, "average/c": 30, "guard/a": 1}
    assert layout(sizes) == {
        "average-00001-of-00002.safetensors": ["average/a"],
        "average-00002-of-00002.safetensors": ["average/b", "average/c"],
        "guard.safetensors": ["guard/a"],
    }


@pytest.mark.parametrize(
    "file", ["state.json", "a.b.safetensors", "-.safetensors", "a-1.safetensors"]
)
def test_other_files_hold_no_tensors(file):
    assert group_of(file) == ""


@given(FILES, st.integers(1, 20))
def test_each_file_has_one_worker_and_loads_are_even(sizes, num_workers):
    found = shares(sizes, num_workers)
    assert len(found) == num_workers
    assert sorted(file for mine in found for file in mine) == sorted(sizes)
    total, largest = sum(sizes.values()), max(sizes.values(), default=0)
    busy = max(1, min(num_workers, total // LIMIT))
    loads = [sum(sizes[file] for file in mine) for mine in found]
    assert sum(load > 0 for load in loads) <= busy
    # No worker gets a file while another has less.
    assert max(loads) <= total / busy + largest
    assert is_sharded(found) <= (busy > 1)


def test_those_with_files_are_spread_over_the_ranks():
    found = shares({str(n): LIMIT for n in range(4)}, 8)
    assert [len(mine) for mine in found] == [1, 0] * 4


def test_a_small_state_is_worker_0s():
    first, *others = layout_of_each({"generator/a": 90, "guard/a": 9}, 8)
    assert first == {"generator.safetensors": ["generator/a"], "guard.safetensors": ["guard/a"]}
    assert not any(others)
