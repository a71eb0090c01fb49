"""Tests of trees from the adjacency tables on a device, against the host and naive searches."""

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from adjacency_steps import (
    BITS,
    DEVICE,
    ORDER,
    SLOTS,
    VOCAB,
    K,
    Step,
    TreeStep,
    as_ids,
    assert_same,
    fast,
    few,
    tree_steps,
)
from device_wait import no_device_wait
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.plugins.drafting import adjacency
from pilotfish.plugins.drafting.adjacency_table import make_acceptance_rates, make_adjacency_table

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value"),
]


@pytest.fixture(scope="module")
def kernels(interpreted_triton: None) -> ModuleType:
    return importlib.import_module("pilotfish.plugins.drafting.adjacency_triton")


@fast
@given(st.lists(tree_steps(), min_size=1, max_size=2), st.lists(few, min_size=2, max_size=12))
def test_trees_update_tables_as_on_the_host(kernels: ModuleType, events: list[TreeStep], prompt: list[int]) -> None:
    device = kernels.DeviceAdjacencyTables(VOCAB, K, ORDER, BITS, 1, SLOTS, DEVICE)
    host = make_adjacency_table(VOCAB, K, ORDER, BITS), make_acceptance_rates(ORDER, K)
    device.prime_from_text(0, torch.tensor(prompt, dtype=torch.int32, device=DEVICE))
    adjacency.prime_from_text(host[0], ORDER, as_ids(prompt))
    for event in events:
        device.update(event.on_device(list(range(len(event.texts))), width=6))
        event.on_host([host] * len(event.texts))
    assert_same(device, host)


def propose(
    device: Any, prompt: list[int], nodes: int, chain: Any = None, chain_only: bool = False
) -> tuple[list[int], list[int], list[float]]:
    """Return the tokens, parents and scores of the tree below a prompt."""
    batch = TreeStep([prompt], [([], [])], [[]], 0).on_device([2], width=1)
    assert batch.chain_only is not None
    batch.chain_only.fill_(chain_only)
    drafts = torch.full((1, nodes), -7, dtype=torch.int64, device=DEVICE)
    parents = torch.full((1, nodes), -7, dtype=torch.int32, device=DEVICE)
    scores = torch.full((1, nodes), -7.0, dtype=torch.float32, device=DEVICE)
    with no_device_wait():
        device.propose_trees(batch, drafts, parents, scores, chain)
    return drafts[0].tolist(), parents[0].tolist(), scores[0].tolist()


def tables(kernels: ModuleType, prompt: list[int], events: list[Step]) -> tuple[Any, tuple[Any, Any]]:
    host = make_adjacency_table(VOCAB, K, ORDER, BITS), make_acceptance_rates(ORDER, K)
    adjacency.prime_from_text(host[0], ORDER, as_ids(prompt))
    for event in events:
        event.on_host([host] * len(event.texts))
    device = kernels.DeviceAdjacencyTables(VOCAB, K, ORDER, BITS, 1, SLOTS, DEVICE)
    device.from_host(0, *host)
    return device, host


def all_nodes(host: Any, text: list[int], depth: int, score: float = 1.0) -> list[float]:
    """Return the scores of all nodes of the unbounded tree below a text, down to a depth."""
    row, length = adjacency.find_row(host[0], as_ids(text)[-ORDER:], ORDER)
    scores: list[float] = []
    for rank, token in enumerate(host[0].tokens[row].tolist()):
        if token >= 0 and depth:
            here = score * float(host[1].rate[length, rank, host[0].confidence[row, rank]])
            scores += [here, *all_nodes(host, [*text, token], depth - 1, here)]
    return scores


@fast
@given(st.lists(few, min_size=2, max_size=30), st.lists(tree_steps(), max_size=2), st.integers(1, 5))
def test_trees_have_the_best_nodes(kernels: ModuleType, prompt: list[int], events: list[Step], nodes: int) -> None:
    device, host = tables(kernels, prompt, events)
    tokens, parents, scores = propose(device, prompt, nodes)
    best = sorted(all_nodes(host, prompt, min(nodes, 4)), reverse=True)[:nodes]
    found = [s for s in scores if s > 0]
    assert len(found) >= len(best)
    assert sum(found[: len(best)]) >= 0.97 * sum(best)  # a beam search
    assert scores == sorted(scores, reverse=True)
    for node, (token, parent, score) in enumerate(zip(tokens, parents, scores, strict=True)):
        assert -1 <= parent < node
        if score == 0:  # there are too few candidates
            assert token == prompt[-1]
            continue
        path = [token]
        above = parent
        while above >= 0:
            path.insert(0, tokens[above])
            above = parents[above]
        row, length = adjacency.find_row(host[0], as_ids([*prompt, *path[:-1]])[-ORDER:], ORDER)
        rank = host[0].tokens[row].tolist().index(token)
        before = 1.0 if parent < 0 else scores[parent]
        assert score == pytest.approx(before * float(host[1].rate[length, rank, host[0].confidence[row, rank]]), 1e-5)
    siblings = [(p, t) for p, t, s in zip(parents, tokens, scores, strict=True) if s > 0]
    assert len(set(siblings)) == len(siblings)


@fast
@given(st.lists(few, min_size=2, max_size=30), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
def test_a_tree_contains_the_chain_of_another_source(kernels: ModuleType, prompt: list[int], chain: list[int]) -> None:
    device, _ = tables(kernels, prompt, [])
    nodes = 8
    ids, scores = torch.zeros(1, nodes, dtype=torch.int64), torch.zeros(1, nodes)
    ids[0, : len(chain)] = torch.tensor(chain)
    scores[0, : len(chain)] = 0.99 ** torch.arange(1, len(chain) + 1)
    tokens, parents, found = propose(device, prompt, nodes, (ids.to(DEVICE), scores.to(DEVICE)))
    node = -1
    for depth, token in enumerate(chain):
        fits = [n for n in range(nodes) if parents[n] == node and tokens[n] == token and found[n] > 0]
        assert len(fits) == 1
        node = fits[0]
        assert found[node] >= float(scores[0, depth]) - 1e-6


@fast
@given(st.lists(few, min_size=2, max_size=30))
def test_a_request_may_be_limited_to_chains(kernels: ModuleType, prompt: list[int]) -> None:
    device, _ = tables(kernels, prompt, [])
    tokens, parents, scores = propose(device, prompt, 6, chain_only=True)
    assert parents == list(range(-1, 5))
    assert scores == sorted(scores, reverse=True) and len(tokens) == 6
