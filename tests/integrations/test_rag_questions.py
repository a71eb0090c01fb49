"""Files of questions in the forms that people have; scores of answers."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.integrations.rag import questions, scoring
from pilotfish.plugins.config import ConfigError

SQUAD = {
    "data": [
        {
            "title": "Fish",
            "paragraphs": [
                {
                    "context": "Pilot fish travel with sharks.",
                    "qas": [
                        {"question": "With whom?", "answers": [{"text": "sharks"}, {"text": "with sharks"}]},
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Sharks are fish.", "qas": []},
            ],
        }
    ]
}
HOTPOT = [
    {
        "question": "Who?",
        "answer": "Ann",
        "context": [["Ann", ["Ann is.", " She was."]], ["Bob", ["Bob is."]], ["Cid", ["Cid."]]],
        "supporting_facts": [["Ann", 0], ["Bob", 0], ["Ann", 1]],
    }
]
DPR = [
    {"question": "a?", "answers": ["A"], "ctxs": [{"title": "T", "text": "A.", "isgold": True}]},
    {"question": "b?", "answers": ["B"], "ctxs": [{"title": "T", "text": "B."}, {"title": "T", "text": "A."}]},
]


def written(path: Path, content: Any) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in content) if ".jsonl" in path.name else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_forms(tmp_path: Path) -> None:
    squad = questions.read(written(tmp_path / "squad.en.json", SQUAD))
    assert squad.name == "squad"
    assert squad.cases == [
        questions.Case("With whom?", ("sharks", "with sharks"), ("Fish/0",)),
        questions.Case("Why?", (), ("Fish/0",)),
    ]
    assert [d["text"] for d in squad.documents.values()] == ["Pilot fish travel with sharks.", "Sharks are fish."]
    hotpot = questions.read(written(tmp_path / "hotpot.json.gz", HOTPOT))
    assert hotpot.cases == [questions.Case("Who?", ("Ann",), ("Ann", "Bob"))]
    assert hotpot.documents["Ann"]["text"] == "Ann is. She was."
    dpr = questions.read(written(tmp_path / "dpr.jsonl.gz", DPR))
    assert dpr.cases == [questions.Case("a?", ("A",), ("T/0",)), questions.Case("b?", ("B",))]
    assert list(dpr.documents) == ["T/0", "T/1"], "the same passage twice is one"
    own = questions.read(written(tmp_path / "own.jsonl", [{"question": "q", "answer": "a", "documents": ["x"]}]))
    assert own.cases == [questions.Case("q", ("a",), ("x",))] and not own.documents


def test_a_folder_is_a_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    written(folder / "a.json", HOTPOT)
    written(folder / "corpus.json", {"Ann": ["Ann is."]})
    written(folder / "b.jsonl", DPR)
    found = questions.read(folder)
    assert (found.name, len(found.cases)) == ("both", 3)


def test_some_passages_are_held_out(tmp_path: Path) -> None:
    found = questions.read(written(tmp_path / "hotpot.json", HOTPOT))
    assert found.held_out(1.0) == {"Ann", "Bob"}, "those that no question needs stay"
    assert len(found.held_out(0.5)) == 1 and found.held_out(0.0) == set()
    assert found.held_out(0.5, 1) == found.held_out(0.5, 1)
    cases = questions.sample([questions.Case(str(i)) for i in range(50)], 10)
    assert len(set(cases)) == 10 and cases == questions.sample([questions.Case(str(i)) for i in range(50)], 10)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"data": [{}]}',
        b'{"data": [{"paragraphs": [{"context": "x"}]}]}',
        b'[{"question": 1}]',
        b'[{"question": "x", "answers": "y"}]',
        b'[{"text": "x"}]',
        b'{"no": "data"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_holds_no_questions_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.json"):
        questions.read(file)
    with pytest.raises(ConfigError, match="No such file"):
        questions.read(tmp_path / "absent.json")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "x"}')[:-9])
    with pytest.raises(ConfigError, match=r"cut\.jsonl\.gz"):
        questions.read(tmp_path / "cut.jsonl.gz")


def test_scores_are_those_of_squad() -> None:
    assert scoring.normalised("The Cat, [1] an  apple!") == "cat apple"
    assert scoring.exact_match("The sharks [2].", ["sharks"])
    assert not scoring.exact_match("some sharks", ["sharks"])
    assert scoring.contains("It was 1901, of course [1, 2].", ["in 1900", "1901"])
    assert not scoring.contains("It was 19012.", ["1901"])
    assert not scoring.contains("anything", ["the"]), "an answer of nothing is in no text"
    assert scoring.f1("with the big sharks", ["sharks"]) == 0.5
    assert scoring.f1("", ["sharks"]) == 0.0
    assert scoring.f1("anything", []) == 0.0


@given(st.text(), st.text())
def test_scores_are_bounded_and_symmetric(a: str, b: str) -> None:
    assert 0.0 <= scoring.f1(a, [b]) <= 1.0
    assert scoring.f1(a, [b]) == scoring.f1(b, [a])
    assert scoring.exact_match(a, [a])
    if scoring.exact_match(a, [b]):
        assert scoring.f1(a, [b]) == 1.0
