"""Tests of the searches on a device against those on the host, which have a naive oracle of their own."""

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.plugins.contracts import DeviceBatch
from pilotfish.plugins.drafting.history import TokenHistory

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_NUM_REQS, LENGTH, WIDTH, MOST = 4, 64, 3, 4
fast = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = st.integers(0, 2)  # so that texts repeat
texts = st.lists(st.lists(few, min_size=1, max_size=40), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def module(interpreted_triton: None) -> Iterator[ModuleType]:
    """Return the module, with blocks so small that a text has several."""
    module = importlib.import_module("pilotfish.plugins.drafting.history_triton")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BLOCK", 8), ("REQUESTS", 2)):
            patch.setattr(module, name, value)
        yield module


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int32, device=DEVICE)


def batch_of(texts: list[list[int]]) -> DeviceBatch:
    """Return a batch whose requests have the last indices first."""
    rows, lengths = torch.zeros(MAX_NUM_REQS, LENGTH, dtype=torch.int32), torch.zeros(MAX_NUM_REQS, dtype=torch.int32)
    indices = list(range(MAX_NUM_REQS))[::-1][: len(texts)]
    for i, text in zip(indices, texts, strict=True):
        rows[i, : len(text)], lengths[i] = torch.tensor(text, dtype=torch.int32), len(text)
    empty = torch.zeros(0, device=DEVICE)
    return DeviceBatch(
        num_requests=len(texts),
        max_num_logits=1,
        idx_mapping=torch.tensor(indices, device=DEVICE),
        all_token_ids=rows.to(DEVICE),
        total_len=lengths.to(DEVICE),
        num_sampled=empty,
        cu_num_logits=empty,
        input_ids=empty,
        positions=empty,
        candidate_ids=empty,
        candidate_probs=empty,
    )


def find(
    module: ModuleType, own: bool, history: Any, batch: DeviceBatch, longest: int, shortest: int
) -> list[tuple[Any, Any]]:
    """Return followers and lengths of each source."""
    search = module.SuffixSearch(own, history, MAX_NUM_REQS, LENGTH, longest, shortest, DEVICE)
    followers = torch.full((search.sources, MAX_NUM_REQS, MOST, WIDTH), 7, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((search.sources, MAX_NUM_REQS), 7, dtype=torch.int32, device=DEVICE)
    search.find(batch, followers, lengths)
    return list(zip(followers.cpu().numpy(), lengths.cpu().numpy(), strict=True))


def assert_same(
    found: tuple[Any, Any], i: int, text: list[int], history: TokenHistory, bounds: tuple[int, int]
) -> None:
    length, followers = history.find_longest_suffix(np.array(text, np.int32), WIDTH, MOST, *bounds)
    assert found[1][i] == length
    rows = found[0][i]
    np.testing.assert_array_equal(rows[: len(followers)], followers)
    assert (rows[len(followers) :] == -1).all()


@fast
@given(texts, st.integers(2, 12), st.integers(2, 4))
def test_own_texts_are_searched_as_on_the_host(
    module: ModuleType, texts: list[list[int]], longest: int, shortest: int
) -> None:
    bounds = max(longest, shortest), shortest
    (found,) = find(module, True, None, batch_of(texts), *bounds)
    for i, text in enumerate(texts):
        history = TokenHistory(LENGTH)
        history.append(np.array(text, np.int32))
        assert_same(found, i, text, history, bounds)


@fast
@given(st.lists(st.lists(few, max_size=50), max_size=5), texts, st.integers(2, 12), st.booleans())
def test_earlier_outputs_are_searched_as_on_the_host(
    module: ModuleType, outputs: list[list[int]], texts: list[list[int]], longest: int, own: bool
) -> None:
    device, host = module.DeviceHistory(64, DEVICE), TokenHistory(64)
    for output in outputs:
        device.append(ids(*output, *[9] * (LENGTH - len(output))), 0, ids(len(output)))
        host.append(np.array(output, np.int32), ends=True)
    found = find(module, own, device, batch_of(texts), longest, 2)
    assert len(found) == 1 + own
    for i, text in enumerate(texts):
        assert_same(found[-1], i, text, host, (longest, 2))
        if own:
            text_alone = TokenHistory(LENGTH)
            text_alone.append(np.array(text, np.int32))
            assert_same(found[0], i, text, text_alone, (longest, 2))


def test_a_text_longer_than_the_ring_leaves_its_end(module: ModuleType) -> None:
    device = module.DeviceHistory(16, DEVICE)
    device.append(ids(*range(40), *[0] * 24), 5, ids(40))
    ring = device.ring.cpu().tolist()
    assert sorted(ring) == [-1, *range(25, 40)]
    assert device.written.item() == 36
