"""Schedule of KV correction, without an engine."""

from types import SimpleNamespace

from pilotfish.integrations.vllm.attention.sparse.kv_correction import KVCorrector


def decode(corrector: KVCorrector, request: SimpleNamespace, steps: int) -> list[int]:
    """Simulate a scheduler that computes all tokens not yet computed; returns the number of each step."""
    counts = []
    for _ in range(steps):
        scheduled = request.num_tokens - request.num_computed_tokens
        request.num_computed_tokens += scheduled
        request.num_tokens += 1
        counts.append(scheduled)
        corrector.after_step({"a": request}, {"a": scheduled})
    return counts


def test_tokens_are_recomputed_every_interval() -> None:
    request = SimpleNamespace(num_tokens=100, num_computed_tokens=0)
    corrector = KVCorrector(interval=3, budget=64)
    assert decode(corrector, request, 9) == [100, 1, 1, 1, 4, 1, 1, 1, 4]
    assert corrector.corrected == 6


def test_no_correction_within_the_budget() -> None:
    request = SimpleNamespace(num_tokens=10, num_computed_tokens=0)
    corrector = KVCorrector(interval=2, budget=15)
    assert decode(corrector, request, 9) == [10, 1, 1, 1, 1, 1, 1, 1, 3]


def test_state_of_finished_requests_is_removed() -> None:
    request = SimpleNamespace(num_tokens=100, num_computed_tokens=0)
    corrector = KVCorrector(interval=2, budget=0)
    decode(corrector, request, 2)
    corrector.after_step({}, {"a": 1})
    assert corrector._exact == {}
