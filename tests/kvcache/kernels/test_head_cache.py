"""Tests of the KV cache with separate blocks per head, against naive attention without the evicted tokens."""

import numpy as np
import pytest
import torch
from growing import Text
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.kvcache.head_window import HeadWindow
from pilotfish.kvcache.kernels.head_cache import CPUHeadCaches


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(40, 600), min_size=1, max_size=3),
    windowed=st.lists(st.booleans(), min_size=1, max_size=4),
    share=st.sampled_from([1, 3, 4, 5]),
    size=st.sampled_from([32, 64, 80]),
    block=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    sinks=st.integers(0, 70),
    length=st.integers(1, 300),
    ratio=st.sampled_from([0, 2, 5]),
    compensation=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 1 << 30),
    chunk=st.integers(1, 400),
)
def test_attention_matches_naive_windowed_attention(
    lengths, windowed, share, size, block, dtype, sinks, length, ratio, compensation, exact, seed, chunk
) -> None:
    window = HeadWindow(sinks, length, ratio, compensation, exact)
    text = Text(lengths, windowed, share, size, block, dtype, window, seed)
    text.grow(max(chunk, max(lengths) // 8))


def test_means_cover_all_tokens_between_sinks_and_block() -> None:
    window = HeadWindow(4, 64, 0, True, exact_prefill=True)
    text = Text([700], [True], 2, 64, 32, torch.float32, window, 5)
    for begin, end in ((0, 100), (100, 101), (101, 350), (350, 700)):
        text.step([begin], [end], prompt_len=700)
    page = text.memory[0][text.tables[0][0].long()]
    means = page[:, 32 * 128 :].view(-1, 2, 64)
    assert (means[1] == 0).all(), "there is nothing between the sinks and the first block after them"
    for j in range(2, 22):
        np.testing.assert_allclose(means[j, 0], text.keys[0][32 : 32 * j, 0].mean(0), atol=1e-5)
        np.testing.assert_allclose(means[j, 1], text.values[0][32 : 32 * j, 0].mean(0), atol=1e-5)


@pytest.mark.parametrize("room", [0, 8])
def test_refuses_blocks_without_room_for_means(room: int) -> None:
    memory = torch.zeros(4, 32 * 128 + room)
    cache = memory.as_strided((4, 1, 32, 128), (32 * 128 + room, 32 * 128, 128, 1))
    with pytest.raises(ValueError, match="no room for means"):
        CPUHeadCaches([cache], [True], HeadWindow(4, 64, 0, True, False))
    CPUHeadCaches([cache], [False], HeadWindow(4, 64, 0, True, False))
