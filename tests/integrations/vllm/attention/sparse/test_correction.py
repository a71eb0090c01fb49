"""When requests are set back, without an engine."""

from types import SimpleNamespace

from pilotfish.integrations.vllm.attention.sparse.kv_correction import KVCorrector


def decode(corrector: KVCorrector, request: SimpleNamespace, steps: int) -> list[int]:
    """Play a scheduler: compute whatever lies between the computed tokens and the text; returns what each step did."""
    done = []
    for _ in range(steps):
        scheduled = request.num_tokens - request.num_computed_tokens
        request.num_computed_tokens += scheduled
        request.num_tokens += 1
        done.append(scheduled)
        corrector.after_step({"a": request}, {"a": scheduled})
    return done


def test_every_interval_the_tokens_since_are_computed_again() -> None:
    request = SimpleNamespace(num_tokens=100, num_computed_tokens=0)
    corrector = KVCorrector(interval=3, budget=64)
    assert decode(corrector, request, 9) == [100, 1, 1, 1, 4, 1, 1, 1, 4]
    assert corrector.corrected == 6


def test_within_the_budget_nothing_needs_correction() -> None:
    request = SimpleNamespace(num_tokens=10, num_computed_tokens=0)
    corrector = KVCorrector(interval=2, budget=15)
    assert decode(corrector, request, 9) == [10, 1, 1, 1, 1, 1, 1, 1, 3]


def test_a_request_that_ended_is_forgotten() -> None:
    request = SimpleNamespace(num_tokens=100, num_computed_tokens=0)
    corrector = KVCorrector(interval=2, budget=0)
    decode(corrector, request, 2)
    corrector.after_step({}, {"a": 1})
    assert corrector._exact == {}
