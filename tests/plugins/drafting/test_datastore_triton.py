"""Tests of the search in a datastore on a device against that on the host."""

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ahead_of_time import compiled_kernels
from device_wait import no_device_wait
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pilotfish.plugins.contracts import DeviceBatch
from pilotfish.plugins.drafting import suffix_search
from pilotfish.plugins.drafting.suffix_array import TEXT_BREAK, build_suffix_array

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
fast = settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
few = st.integers(0, 3)


@pytest.fixture(scope="module")
def module(interpreted_triton: None) -> ModuleType:
    return importlib.import_module("pilotfish.plugins.drafting.datastore_triton")


def step(texts: list[list[int]]) -> DeviceBatch:
    """Return a step of requests with these texts."""
    rows = torch.zeros(len(texts), 64, dtype=torch.int32)
    for i, text in enumerate(texts):
        rows[i, : len(text)] = torch.tensor(text)
    nothing: Any = torch.empty(0)
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32).to(DEVICE)
    indices = torch.arange(len(texts)).to(DEVICE)
    return DeviceBatch(len(texts), 1, indices, rows.to(DEVICE), lengths, *[nothing] * 6)


def search(module: ModuleType, tokens: list[int], texts: list[list[int]], longest: int, most: int, width: int) -> Any:
    """Return the lengths of matches, and the tokens after their occurrences."""
    array = np.array(tokens, np.int32)
    store = SimpleNamespace(tokens=array, order=build_suffix_array(array))
    device = module.DatastoreSearch(store, longest, 2, DEVICE)
    assert device.nbytes == 8 * len(tokens)
    followers = torch.full((len(texts), most, width), -7, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((len(texts),), -7, dtype=torch.int32, device=DEVICE)
    batch = step(texts)
    with no_device_wait():
        device.find(batch, followers, lengths)
    return lengths.tolist(), followers.cpu().numpy(), store


@fast
@given(
    st.lists(st.one_of(few, few, st.just(TEXT_BREAK)), min_size=1, max_size=200),
    st.lists(st.lists(few, min_size=1, max_size=20), min_size=1, max_size=3),
    st.sampled_from([3, 16, 40]),
    st.sampled_from([1, 3]),
)
def test_matches_and_followers_are_those_of_the_host(
    module: ModuleType, tokens: list[int], texts: list[list[int]], longest: int, most: int
) -> None:
    lengths, followers, store = search(module, tokens, texts, longest, most, width=4)
    for i, text in enumerate(texts):
        tail = np.array(text, np.int32)
        match = suffix_search.find_longest_suffix(store.tokens, store.order, tail, longest, 2)
        assert lengths[i] == match.length
        expected = suffix_search.continuations(store.tokens, store.order, match, 4, most)
        np.testing.assert_array_equal(followers[i, : len(expected)], expected)
        assert (followers[i, len(expected) :] == TEXT_BREAK).all()


def test_a_large_datastore_is_searched_in_several_rounds(module: ModuleType) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, 20_000).tolist()
    texts = [tokens[i : i + 30] for i in (0, 5_000, 19_960)] + [[60, 61, 62]]
    lengths, followers, _ = search(module, tokens, texts, 16, 2, width=3)
    assert lengths == [16, 16, 16, 0]
    for i, begin in enumerate((0, 5_000, 19_960)):
        assert followers[i, 0].tolist() == tokens[begin + 30 : begin + 33]


COMPILE = """
from types import SimpleNamespace
import numpy as np
import torch
from ahead_of_time import compiled_launches
from pilotfish.plugins.drafting.datastore_triton import DatastoreSearch
from test_datastore_triton import step
with compiled_launches() as sizes:
    store = SimpleNamespace(tokens=np.zeros(9, np.int32), order=np.zeros(9, np.uint32))
    search = DatastoreSearch(store, 16, 2, torch.device("cpu"))
    search.find(step([[1, 2, 3]]), torch.zeros(1, 8, 12, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
print(sorted(sizes))
"""


def test_kernel_compiles_for_a_gpu() -> None:
    assert compiled_kernels(COMPILE, Path(__file__).parent) == ["search_datastore_kernel"]
