"""The cache with blocks of each head's own: against attention without the window's gap, written plainly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.kvcache import reference
from pilotfish.kvcache.head_window import HeadWindow
from pilotfish.kvcache.kernels.head_cache import HeadCaches, WindowedStep, means_bytes

TOLERANCE = {torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


class Text:
    """Requests that grow chunk by chunk, in a layer whose heads have blocks of their own."""

    def __init__(self, lengths, windowed, share, size, block, dtype, window, seed) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.window, self.block, self.size, self.share, self.dtype = window, block, size, share, dtype
        self.windowed, self.lengths = windowed, lengths
        blocks = [-(-n // block) + 1 for n in lengths]
        page = block * 2 * size + means_bytes(size) // torch.empty(0, dtype=dtype).element_size()
        memory = torch.full((len(windowed), sum(blocks) + 1, page), float("nan"), dtype=dtype)
        strides = (page, block * 2 * size, 2 * size, 1)
        shape = (sum(blocks) + 1, 1, block, 2 * size)
        self.caches = HeadCaches([m.as_strided(shape, strides) for m in memory.unbind()], windowed, window)
        self.memory = memory
        self.tables = []
        for _ in windowed:
            order, table = torch.randperm(sum(blocks), generator=self.rng), torch.zeros(len(lengths), max(blocks))
            used = 0
            for r, n in enumerate(blocks):
                table[r, :n] = order[used : used + n] + 1
                used += n
            self.tables.append(table.int())
        heads = len(windowed)
        self.keys, self.values = (
            [(torch.randn(n, heads, size, generator=self.rng) + 0.3).to(dtype) for n in lengths] for _ in range(2)
        )

    def step(self, begins, ends, in_prompt=False):
        """Process positions of every request; returns what was asked and answered for each."""
        key = torch.cat([k[b:e] for k, b, e in zip(self.keys, begins, ends, strict=True)])
        value = torch.cat([v[b:e] for v, b, e in zip(self.values, begins, ends, strict=True)])
        slots = []
        for table in self.tables:
            positions = [torch.arange(b, e) for b, e in zip(begins, ends, strict=True)]
            slots.append(
                torch.cat(
                    [
                        t[p // self.block].long() * self.block + p % self.block
                        for t, p in zip(table, positions, strict=True)
                    ]
                )
            )
        heads = len(self.windowed) * self.share
        step = WindowedStep(begins, ends, lambda _, n: self.window.left_out(n, self.block, in_prompt), heads)
        query = torch.randn(len(key), heads, self.size, generator=self.rng).to(self.dtype)
        output = torch.full_like(query, 7.0)
        self.caches.bind(self.tables, slots)
        self.caches.store(key, value)
        self.caches.update_means(step)
        self.caches.attend(query, self.size**-0.5, output, step)
        lengths = [e - b for b, e in zip(begins, ends, strict=True)]
        return query.split(lengths), output.split(lengths)

    def check(self, begins, ends, in_prompt=False) -> None:
        """Process positions, and compare the first, the last and some between of every request."""
        query, output = self.step(begins, ends, in_prompt)
        for r, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            for n in {begin, end - 1, *range(begin, end, 37)}:
                gap = self.window.left_out(n, self.block, in_prompt)
                np.testing.assert_allclose(
                    output[r][n - begin].double().numpy(),
                    self.expected(query[r][n - begin], r, n + 1, gap),
                    atol=TOLERANCE[self.dtype],
                )

    def expected(self, query, r, end, gap):
        """[query_heads, size] of a token of request ``r`` with ``end`` positions."""
        sinks = self.caches.sink_blocks * self.block
        parts = []
        for h, leaves_out in enumerate(self.windowed):
            left_out = (sinks, sinks + gap) if leaves_out else (0, 0)
            q = query[h * self.share : (h + 1) * self.share].double().numpy()
            k, v = (x[r][:end, h].double().numpy() for x in (self.keys, self.values))
            parts.append(reference.windowed_attention(q, k, v, self.size**-0.5, left_out, self.window.compensation))
        return np.concatenate(parts)


@settings(max_examples=20, deadline=None)
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
    seed=st.integers(0, 1 << 30),
    chunk=st.integers(1, 400),
)
def test_heads_attend_to_what_their_window_leaves(
    lengths, windowed, share, size, block, dtype, sinks, length, ratio, compensation, seed, chunk
) -> None:
    window = HeadWindow(sinks, length, ratio, compensation, exact_prefill=False)
    text = Text(lengths, windowed, share, size, block, dtype, window, seed)
    done = [0] * len(lengths)
    while min(done) < min(lengths) - 1:  # prompts of all requests, chunk by chunk, then two decoded tokens
        ends = [min(d + chunk, n - 1) for d, n in zip(done, lengths, strict=True)]
        if any(e == d for d, e in zip(done, ends, strict=True)):
            break
        text.check(done, ends)
        done = ends
    for _ in range(2):
        ends = [min(d + 1, n) for d, n in zip(done, lengths, strict=True)]
        if ends == done or any(e == d for d, e in zip(done, ends, strict=True)):
            break
        text.check(done, ends)
        done = ends


def test_the_means_are_of_everything_between_sinks_and_block() -> None:
    window = HeadWindow(4, 64, 0, True, exact_prefill=True)
    text = Text([700], [True], 2, 64, 32, torch.float32, window, 5)
    for begin, end in ((0, 100), (100, 101), (101, 350), (350, 700)):
        text.step([begin], [end], in_prompt=True)
    page = text.memory[0][text.tables[0][0].long()]
    means = page[:, 32 * 128 :].view(-1, 2, 64)
    assert (means[1] == 0).all(), "there is nothing between the sinks and the first block behind them"
    for j in range(2, 22):
        np.testing.assert_allclose(means[j, 0], text.keys[0][32 : 32 * j, 0].mean(0), atol=1e-5)
        np.testing.assert_allclose(means[j, 1], text.values[0][32 : 32 * j, 0].mean(0), atol=1e-5)


@pytest.mark.parametrize("room", [0, 8])
def test_blocks_without_room_for_means_are_refused(room: int) -> None:
    memory = torch.zeros(4, 32 * 128 + room)
    cache = memory.as_strided((4, 1, 32, 128), (32 * 128 + room, 32 * 128, 128, 1))
    with pytest.raises(ValueError, match="no room for means"):
        HeadCaches([cache], [True], HeadWindow(4, 64, 0, True, False))
    HeadCaches([cache], [False], HeadWindow(4, 64, 0, True, False))
