"""The window of a head: what is kept is enough, never comes back, and fits what admission was told."""

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.kvcache.head_window import HeadWindow

windows = st.builds(
    HeadWindow,
    sinks=st.integers(0, 300),
    window=st.integers(1, 3000),
    ratio=st.integers(0, 8),
    compensation=st.booleans(),
    exact_prefill=st.booleans(),
)
blocks = st.sampled_from([16, 32, 128])


@given(windows, blocks, st.integers(0, 20000))
def test_the_window_keeps_at_least_its_length_and_never_turns_back(window: HeadWindow, block: int, tokens: int) -> None:
    first, after = window.first_kept(tokens, block), window.first_kept(tokens + 1, block)
    assert window.sink_blocks(block) * block >= window.sinks
    assert first <= after <= first + 1 or first == window.sink_blocks(block)
    assert first >= window.sink_blocks(block)
    if first > window.sink_blocks(block):
        kept = tokens - first * block
        assert window.length(tokens) <= kept < window.length(tokens) + block, (
            "no more is kept than whole blocks ask for"
        )


@given(windows, blocks, st.integers(1, 20000), st.integers(1, 4000))
def test_a_step_never_holds_more_blocks_than_admission_was_told(
    window: HeadWindow, block: int, tokens: int, in_flight: int
) -> None:
    before = max(0, tokens - in_flight)
    held = -(-tokens // block)
    held -= window.first_kept(before, block) - window.sink_blocks(block)
    assert held <= window.decoding_blocks(tokens, in_flight, block)
    assert window.decoding_blocks(tokens, in_flight, block) <= window.most_blocks(tokens, in_flight, block)


def test_a_prompt_is_whole_when_prefill_is_exact() -> None:
    exact, streaming = (HeadWindow(4, 512, 5, True, exact) for exact in (True, False))
    assert exact.first_kept(8000, 32, in_prompt=True) == 1
    assert exact.first_kept(8000, 32) == streaming.first_kept(8000, 32) == (8000 - 1600) // 32
    assert exact.most_blocks(8000, 2048, 32) == 250
    assert streaming.most_blocks(8000, 2048, 32) == 1 + (1600 + 2048) // 32 + 1
