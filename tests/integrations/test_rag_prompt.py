"""Prompts of passages: what strangers wrote stays quoted; citations; thresholds."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.integrations.rag import citations, prompt, threshold


def passages(*texts: str) -> list[Any]:
    return [SimpleNamespace(number=i, text=text) for i, text in enumerate(texts, 1)]


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_no_passage_gets_out_of_its_quotes(texts: list[str]) -> None:
    asked = prompt.messages(passages(*texts), "who?")
    lines = asked[-1]["content"].splitlines()
    assert lines[-1] == "Question: who?"
    free = [line for line in lines[:-1] if line and not line.startswith("> ")]
    assert free == [f"Passage [{i}]" for i in range(1, len(texts) + 1)]
    assert not any("<" in line for line in lines)
    assert asked[0] == prompt.messages(passages("other"), "what?")[0], "the prefix never changes"


def test_passages_are_cut_and_history_forgets_its_oldest_turns() -> None:
    (one,) = passages("word " * 5_000)
    assert len(prompt.question([one], "?")["content"]) < 6_100
    turns: list[prompt.Message] = []
    for number in range(8):
        turns = prompt.continued(turns, [one], f"question {number}", "an answer")
        assert turns[0]["role"] == "user" and turns[-1]["role"] == "assistant"
    assert sum(len(turn["content"]) for turn in turns) <= 4 * prompt.LONGEST and "question 7" in turns[-2]["content"]
    assert prompt.continued(turns, [], "?", "I do not know.") == turns


def test_citations() -> None:
    known = passages("Pilot fish travel with sharks.", "Bread is baked.")
    assert citations.cited("They do [1], and [2, 7]; again [1].", known) == [1, 2]
    assert citations.attributed("Bread is baked. Nobody knows why.", known) == [2]
    assert citations.attributed("Something else entirely.", known) == []


def test_a_threshold_tells_best() -> None:
    least, share = threshold.calibrate([0.8, 0.7, 0.6], [0.5, 0.3, 0.65])
    assert 0.5 < least < 0.6
    assert abs(share - 5 / 6) < 1e-9
    assert threshold.calibrate([0.2, 0.9, 0.8], [0.7, 0.6, 0.5])[0] < 0.2, "few that can be answered are refused"
    assert threshold.calibrate([-0.5, 0.5], [0.1])[0] == -0.5
    assert threshold.calibrate([], [])[0] == 0.0
