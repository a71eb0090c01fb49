"""Tests of the adjacency tables on a device against those on the host, which have a naive oracle of their own.

The kernels are interpreted if there is no GPU.
"""

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from adjacency_steps import BITS, DEVICE, ORDER, SLOTS, VOCAB, K, Step, as_ids, assert_same, fast, few, steps
from ahead_of_time import compiled_kernels
from device_wait import DeviceWaitError, no_device_wait
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.plugins.drafting import adjacency
from pilotfish.plugins.drafting.adjacency_table import make_acceptance_rates, make_adjacency_table

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    # From NumPy, in Triton's interpreter: a hash wraps.
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value"),
]


@pytest.fixture(scope="module")
def kernels(interpreted_triton: None) -> ModuleType:
    """Return the module of the tables; its kernels are interpreted if there is no GPU."""
    return importlib.import_module("pilotfish.plugins.drafting.adjacency_triton")


def make_tables(kernels: ModuleType, num_tables: int = 1, order: int = ORDER) -> Any:
    return kernels.DeviceAdjacencyTables(VOCAB, K, order, BITS, num_tables, SLOTS, DEVICE)


@fast
@given(st.lists(st.lists(few, min_size=1, max_size=30), max_size=3), st.sampled_from([1, 2, 3, 5]))
def test_prompts_prime_rows_as_on_the_host(kernels: ModuleType, texts: list[list[int]], order: int) -> None:
    device = make_tables(kernels, order=order)
    rows, rates = make_adjacency_table(VOCAB, K, order, BITS), make_acceptance_rates(order, K)
    for text in texts:
        device.prime_from_text(0, torch.tensor(text, dtype=torch.int32, device=DEVICE))
        adjacency.prime_from_text(rows, order, as_ids(text))
    assert_same(device, (rows, rates))


@fast
@given(st.lists(steps(), min_size=1, max_size=3), st.lists(few, min_size=2, max_size=20))
def test_steps_update_tables_as_on_the_host(kernels: ModuleType, events: list[Step], prompt: list[int]) -> None:
    device = make_tables(kernels)
    host = make_adjacency_table(VOCAB, K, ORDER, BITS), make_acceptance_rates(ORDER, K)
    device.prime_from_text(0, torch.tensor(prompt, dtype=torch.int32, device=DEVICE))
    adjacency.prime_from_text(host[0], ORDER, as_ids(prompt))
    for event in events:
        count = len(event.texts)
        batch = event.on_device(list(range(count))[::-1], width=5)
        device.update(batch)
        event.on_host([host] * count)
    assert_same(device, host)


@fast
@given(steps())
def test_each_request_updates_its_own_table(kernels: ModuleType, event: Step) -> None:
    count = len(event.texts)
    device = make_tables(kernels, num_tables=SLOTS)
    device.table_of_request.copy_(torch.arange(SLOTS).flip(0))
    hosts = [(make_adjacency_table(VOCAB, K, ORDER, BITS), make_acceptance_rates(ORDER, K)) for _ in range(count)]
    batch = event.on_device(list(range(count)), width=5)
    device.update(batch)
    event.on_host(hosts)
    for slot, host in enumerate(hosts):
        assert_same(device, host, table=SLOTS - 1 - slot)
    for table in range(SLOTS - count):  # those of other slots
        assert_same(device, (make_adjacency_table(VOCAB, K, ORDER, BITS), make_acceptance_rates(ORDER, K)), table)


def best_chain(rows: Any, rates: Any, text: list[int], steps: int) -> tuple[float, list[int]]:
    """Return the largest expected number of accepted tokens of any chain, and that chain, by exhaustive search."""
    row, length = adjacency.find_row(rows, as_ids(text)[-ORDER:], ORDER)
    best: tuple[float, list[int]] = (0.0, [])
    if not steps:
        return best
    for rank in range(K):
        token = int(rows.tokens[row, rank])
        if token < 0:
            break
        probability = float(rates.rate[length, rank, rows.confidence[row, rank]])
        value, chain = best_chain(rows, rates, [*text, token], steps - 1)
        if probability * (1 + value) > best[0]:
            best = probability * (1 + value), [token, *chain]
    return best


@fast
@given(st.lists(few, min_size=2, max_size=40), st.lists(steps(), max_size=2), st.integers(1, 4))
def test_chains_are_near_the_best(kernels: ModuleType, prompt: list[int], events: list[Step], steps: int) -> None:
    host = make_adjacency_table(VOCAB, K, ORDER, BITS), make_acceptance_rates(ORDER, K)
    adjacency.prime_from_text(host[0], ORDER, as_ids(prompt))
    for event in events:
        event.on_host([host] * len(event.texts))
    device = make_tables(kernels)
    device.from_host(0, *host)
    batch = Step([prompt], [[]], [[]], 0).on_device([2], width=1)
    drafts = torch.zeros(1, steps, dtype=torch.int64, device=DEVICE)
    scores = torch.zeros(1, steps, dtype=torch.float32, device=DEVICE)
    device.propose_chains(batch, drafts, scores)
    value, chain = best_chain(*host, prompt, steps)
    # The scores are the probabilities of the drafted chain.
    text, expected, reached = list(prompt), [], 1.0
    for token in drafts[0].tolist()[: len([s for s in scores[0].tolist() if s])]:
        row, length = adjacency.find_row(host[0], as_ids(text)[-ORDER:], ORDER)
        rank = host[0].tokens[row].tolist().index(token)
        reached *= float(host[1].rate[length, rank, host[0].confidence[row, rank]])
        expected.append(reached)
        text.append(token)
    np.testing.assert_allclose(scores[0].tolist()[: len(expected)], expected, rtol=1e-5)
    assert sum(expected) >= 0.95 * value  # a beam search
    assert len(expected) == len(chain)
    assert drafts[0].tolist()[len(expected) :] == [prompt[-1]] * (steps - len(expected))


def test_a_table_returns_from_the_host_as_it_was(kernels: ModuleType) -> None:
    device = make_tables(kernels, num_tables=2)
    device.prime_from_text(1, torch.tensor([1, 2, 3, 1, 2, 4], dtype=torch.int32, device=DEVICE))
    rows, rates = device.to_host(1)
    device.clear(1)
    assert (device.to_host(1)[0].tokens < 0).all() and not device.to_host(1)[0].keys.any()
    device.from_host(0, rows, rates)
    assert_same(device, (rows, rates))


def test_nothing_waits_for_the_device(kernels: ModuleType) -> None:
    device = make_tables(kernels)
    text = torch.tensor([1, 2, 3, 1, 2], dtype=torch.int32, device=DEVICE)
    batch = Step([[1, 2, 3], [2]], [[1], []], [[1, 2], [3]], 0).on_device([0, 1], width=2)
    drafts, scores = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    with no_device_wait():
        device.prime_from_text(0, text)
        device.update(batch)
        device.propose_chains(batch, drafts, scores)


@pytest.mark.parametrize("read", ["item", "tolist", "cpu", "numpy", "__bool__", "__int__", "nonzero"])
def test_the_check_finds_a_wait(read: str) -> None:
    with no_device_wait(), pytest.raises(DeviceWaitError, match=read):
        getattr(torch.ones(1), read)()
    assert torch.ones(1).item() == 1


COMPILE = """
import torch
from adjacency_steps import Step, TreeStep
from ahead_of_time import compiled_launches
from pilotfish.plugins.drafting.adjacency_triton import DeviceAdjacencyTables
from pilotfish.plugins.drafting.rows_triton import gather_rows
from pilotfish.plugins.drafting.top_k_triton import top_k_probs
with compiled_launches() as sizes:
    device = DeviceAdjacencyTables(128_256, 8, 4, 16, 1, 4, torch.device("cpu"))
    device.prime_from_text(0, torch.zeros(9, dtype=torch.int32))
    batch = Step([[1, 2, 3]], [[1]], [[1, 2]], 0).on_device([0], width=13)
    device.update(batch)
    drafts, scores = torch.zeros(1, 12, dtype=torch.int64), torch.zeros(1, 12)
    device.propose_chains(batch, drafts, scores)
    batch = TreeStep([[1, 2, 3]], [([1, 2], [-1, -1])], [[1, 2]], 0).on_device([0], width=13)
    device.update(batch)
    device.propose_trees(batch, drafts, drafts.int(), scores, chain=(drafts, scores))
    top_k_probs(torch.zeros(2, 128_256, dtype=torch.bfloat16), 8)
    rows = torch.zeros(2, dtype=torch.int64)
    gather_rows(rows.int(), rows, rows)
print(sorted(sizes))
"""


def test_kernels_compile_for_a_gpu() -> None:
    compiled = compiled_kernels(COMPILE)
    from pilotfish.plugins.drafting import (
        programs_adjacency_triton,
        programs_drafts_triton,
        programs_priming_triton,
        rows_triton,
        top_k_triton,
    )

    modules = programs_adjacency_triton, programs_drafts_triton, programs_priming_triton, rows_triton, top_k_triton
    kernels = [name for module in modules for name in vars(module) if name.endswith("_kernel")]
    assert compiled == sorted(kernels)
