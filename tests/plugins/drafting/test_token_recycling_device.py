"""Tests of Token Recycling on a device: which requests share a table, and state files that both sides can read."""

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from device_wait import no_device_wait

from pilotfish.plugins.contracts import DeviceBatch, DeviceLimits, Engine, Unsupported
from pilotfish.plugins.drafting import adjacency_state
from pilotfish.plugins.token_recycling import TokenRecycling
from pilotfish.plugins.token_recycling import TokenRecyclingOptions as Options

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, MAX_NUM_REQS, STEPS = 20, 3, 2
ENGINE = Engine("toy", VOCAB, 64, MAX_NUM_REQS, STEPS)
LIMITS = DeviceLimits(DEVICE, MAX_NUM_REQS, STEPS, 64)
PROMPT = [1, 2, 3, 4, 1, 2]


@pytest.fixture(scope="module")
def module(interpreted_triton: None) -> ModuleType:
    return importlib.import_module("pilotfish.plugins.drafting.token_recycling_device")


def make(module: ModuleType, **options: Any) -> Any:
    return module.DeviceTokenRecycling(Options(**{"k": 3, "order": 3, "bits": 6, **options}), ENGINE, LIMITS)


def ids(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int32, device=DEVICE)


def batch_of(req_idx: int, text: list[int]) -> DeviceBatch:
    """Return a step that sampled the last token of a text."""
    texts, lengths = torch.zeros(MAX_NUM_REQS, 64, dtype=torch.int32), torch.zeros(MAX_NUM_REQS, dtype=torch.int32)
    texts[req_idx, : len(text)], lengths[req_idx] = torch.tensor(text), len(text)
    return DeviceBatch(
        num_requests=1,
        max_num_logits=STEPS + 1,
        idx_mapping=torch.tensor([req_idx], device=DEVICE),
        all_token_ids=texts.to(DEVICE),
        total_len=lengths.to(DEVICE),
        num_sampled=ids([1]),
        cu_num_logits=ids([0, 1]),
        input_ids=ids(text[-2:-1]),
        positions=torch.tensor([len(text) - 2], device=DEVICE),
        candidate_ids=torch.tensor([[text[-1], 18, 19]], device=DEVICE),
        candidate_probs=torch.tensor([[0.8, 0.1, 0.1]], device=DEVICE),
    )


def drafts(drafter: Any, req_idx: int, text: list[int]) -> list[int]:
    return drafter.propose(batch_of(req_idx, text))[0].tolist()


def test_a_prompt_is_drafted_from(module: ModuleType) -> None:
    drafter = make(module)
    drafter.start(0, ids(PROMPT))
    assert drafts(drafter, 0, PROMPT) == [3, 4]
    drafter.start(1, ids([7]))
    assert drafts(drafter, 1, [7, 1, 2]) == [3, 4]  # shared by all requests


def test_a_step_is_learned(module: ModuleType) -> None:
    drafter = make(module, prime=False)
    drafter.start(0, ids([5, 6]))
    drafter.observe(batch_of(0, [5, 6, 9]))
    assert drafts(drafter, 0, [5, 6, 9, 8, 5, 6])[0] == 9


@pytest.mark.parametrize("share", ["tenant", "request"])
def test_requests_that_share_no_table_learn_nothing_from_each_other(module: ModuleType, share: str) -> None:
    drafter = make(module, share=share)
    drafter.start(0, ids(PROMPT), "one")
    drafter.start(1, ids([7]), "two")
    drafter.start(2, ids([7]), "one")
    text = [7, 1, 2]
    assert drafts(drafter, 1, text) == [2, 2]  # nothing is known: the last token
    assert drafts(drafter, 2, text) == ([3, 4] if share == "tenant" else [2, 2])


def test_a_table_is_empty_when_it_goes_to_another_request(module: ModuleType) -> None:
    drafter = make(module, share="request")
    drafter.start(0, ids(PROMPT))
    drafter.finish(0, ids(PROMPT), ids([len(PROMPT)]))
    drafter.start(0, ids([7]))
    assert drafts(drafter, 0, [7, 1, 2]) == [2, 2]
    drafter.finish(1, ids(PROMPT), ids([len(PROMPT)]))  # an unknown request


def test_the_idle_table_unused_longest_goes_to_a_new_tenant(module: ModuleType) -> None:
    drafter = make(module, share="tenant", max_tables=1)  # there are as many as requests can run at once
    for tenant in "abcd":
        drafter.start(0, ids(PROMPT), tenant)
        drafter.finish(0, ids(PROMPT), ids([len(PROMPT)]))
    drafter.start(0, ids([7]), "b")
    drafter.start(1, ids([7]), "a")
    assert drafts(drafter, 0, [7, 1, 2]) == [3, 4]
    assert drafts(drafter, 1, [7, 1, 2]) == [2, 2]


def test_state_files_are_those_of_the_host(module: ModuleType, tmp_path: Path) -> None:
    device = make(module)
    device.start(0, ids(PROMPT))
    device.observe(batch_of(0, [*PROMPT, 3]))
    device.save(tmp_path / "device.npz")
    host = TokenRecycling(Options(k=3, order=3, bits=6, state_path=str(tmp_path / "device.npz")), ENGINE)
    host.save(tmp_path / "host.npz")
    again = make(module, state_path=str(tmp_path / "host.npz"))
    assert drafts(again, 0, PROMPT) == drafts(device, 0, PROMPT)
    states = [adjacency_state.read_state(tmp_path / f"{n}.npz", device.options, ENGINE) for n in ("device", "host")]
    for ours, theirs in zip(*([*rows, *rates] for rows, rates in states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_step_does_not_wait_for_the_device(module: ModuleType) -> None:
    drafter = make(module, share="tenant")
    prompt, batch = ids(PROMPT), batch_of(0, [*PROMPT, 3])
    with no_device_wait():
        drafter.start(0, prompt, "one")
        drafter.observe(batch)
        drafter.propose(batch)
        drafter.finish(0, ids(PROMPT), ids([len(PROMPT)]))


def test_memory_is_stated(module: ModuleType) -> None:
    one, many = make(module), make(module, share="request")
    assert many.nbytes > 2 * one.nbytes > 0


def test_static_trees_are_refused() -> None:
    with pytest.raises(Unsupported, match="remove shape=template"):
        TokenRecycling.check_device(Options(shape="template"), ENGINE)
