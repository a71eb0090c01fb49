"""Tests of the token history against naive search."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.drafting.history import TokenHistory

pieces = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=30), st.booleans()), min_size=1, max_size=8)


def joined(parts: list[tuple[list[int], bool]]) -> list[int]:
    return [t for part, ends in parts for t in [*part, *([-1] if ends else [])]]


def naive_search(
    text: list[int], tail: list[int], width: int, longest: int, shortest: int
) -> tuple[int, list[list[int]]]:
    """Return the longest match and its continuations by naive search, newest first."""
    best, rows = 0, []
    for length in range(max(shortest, 2), min(longest, len(tail)) + 1):
        positions = [
            i for i in range(length, len(text)) if text[i - length : i] == tail[len(tail) - length :] and text[i] >= 0
        ]
        if positions:
            best, rows = length, positions[::-1]
    continuations = []
    for position in rows:
        after = text[position : position + width]
        after = after[: after.index(-1)] if -1 in after else after
        continuations.append([*after, *[-1] * (width - len(after))])
    return best, continuations


@settings(max_examples=300, deadline=None)  # compiles
@given(pieces, st.lists(st.integers(0, 3), max_size=20), st.integers(2, 12), st.integers(2, 4), st.integers(1, 6))
def test_longest_suffix_search_matches_naive_search(parts, tail, longest, shortest, width) -> None:
    history = TokenHistory(1024)
    for part, ends in parts:
        history.append(np.array(part, np.int32), ends)
    length, rows = history.find_longest_suffix(np.array(tail, np.int32), width, 10_000, longest, shortest)
    expected, followers = naive_search(joined(parts), tail, width, longest, shortest)
    if sum(len(p) for p, _ in parts) <= 100:  # few enough positions that the search reads all of them
        assert (length, rows.tolist()) == (expected, followers)
    assert len(history) == len(joined(parts))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(20, 400))
def test_tokens_dropped_from_ring_buffer_are_not_found(seed: int, count: int) -> None:
    text = np.random.default_rng(seed).integers(0, 3, count).astype(np.int32)
    history = TokenHistory(64)
    for begin in range(0, count, 17):
        history.append(text[begin : begin + 17])
    length, rows = history.find_longest_suffix(text[-8:], 4, 1000, 8)
    assert (length, rows.tolist()) == naive_search(text[-64:].tolist(), text[-8:].tolist(), 4, 8, 2)
    assert len(history) == min(count, 64)


def test_capacity_grows_with_the_text() -> None:
    text = np.random.default_rng(0).integers(0, 30, 500).astype(np.int32)
    history, large = TokenHistory(16), TokenHistory(512)
    large.append(text)
    for begin in range(0, 500, 7):
        history = history.with_capacity(len(text[begin : begin + 7]))
        history.append(text[begin : begin + 7])
    assert len(history) == 500
    for end in range(20, 500, 31):
        actual, expected = (h.find_longest_suffix(text[:end], 5, 8, 12) for h in (history, large))
        assert actual[0] == expected[0]
        assert actual[1].tolist() == expected[1].tolist()


def test_repeated_output_is_found_from_its_first_tokens() -> None:
    history, rng = TokenHistory(1 << 14), np.random.default_rng(0)
    outputs = [rng.integers(0, 500, 200).astype(np.int32) for _ in range(20)]
    for output in outputs:
        history.append(output, ends=True)
    for output in outputs:
        length, rows = history.find_longest_suffix(output[:9], 24, 8, 24)
        assert length == 9
        assert rows[0].tolist() == output[9:33].tolist()
