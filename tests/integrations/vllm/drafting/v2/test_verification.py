"""Tests of chain verification against a naive loop."""

import torch
from device_wait import no_device_wait
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.integrations.vllm.drafting.v2.verification import accept_chains

WIDTH = 4
row = st.tuples(st.integers(0, 2), st.integers(-1, 2))  # sampled after the row's token, and the token


@settings(deadline=None)
@given(st.lists(st.lists(row, min_size=1, max_size=WIDTH), min_size=1, max_size=5))
def test_tokens_are_accepted_up_to_the_first_difference(requests: list[list[tuple[int, int]]]) -> None:
    flat = torch.tensor([r for rows in requests for r in rows])
    starts = torch.tensor([0, *(len(rows) for rows in requests)]).cumsum(0).int()
    with no_device_wait():
        tokens, counts = accept_chains(flat[:, 0], flat[:, 1], starts, WIDTH)
    assert tokens.shape == (len(requests), WIDTH) and counts.dtype == torch.int32
    for i, rows in enumerate(requests):
        expected = [rows[0][0]]
        for sampled, token in rows[1:]:
            if token != expected[-1]:
                break
            expected.append(sampled)
        assert tokens[i, : int(counts[i])].tolist() == expected
