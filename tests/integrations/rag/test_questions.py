"""Question files in common dataset formats, and the scores of answers."""

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


def write_questions(path: Path, content: Any) -> Path:
    """Write ``content`` as JSON or JSON lines, compressed if the suffix is .gz, and return the path."""
    text = "".join(json.dumps(line) + "\n" for line in content) if ".jsonl" in path.name else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_reads_common_dataset_formats(tmp_path: Path) -> None:
    squad = questions.read_questions(write_questions(tmp_path / "squad.en.json", SQUAD))
    assert squad.name == "squad"
    assert squad.cases == [
        questions.Case("With whom?", ("sharks", "with sharks"), ("Fish/0",)),
        questions.Case("Why?", (), ("Fish/0",)),
    ]
    assert [d["text"] for d in squad.documents.values()] == ["Pilot fish travel with sharks.", "Sharks are fish."]
    hotpot = questions.read_questions(write_questions(tmp_path / "hotpot.json.gz", HOTPOT))
    assert hotpot.cases == [questions.Case("Who?", ("Ann",), ("Ann", "Bob"), together=True)]
    assert hotpot.documents["Ann"]["text"] == "Ann is. She was."
    dpr = questions.read_questions(write_questions(tmp_path / "dpr.jsonl.gz", DPR))
    assert dpr.cases == [questions.Case("a?", ("A",), ("T",)), questions.Case("b?", ("B",))]
    assert list(dpr.documents) == ["T", "T (2)"], "duplicate passages are merged"
    retriever = [{**DPR[1], "ctxs": [{"title": "T", "text": "B.", "has_answer": True}, {"title": "U", "text": "C."}]}]
    assert questions.read_questions(write_questions(tmp_path / "r.json", retriever)).cases == [
        questions.Case("b?", ("B",), ("T",))
    ]
    training = [{"question": "b?", "answers": ["B"], "positive_ctxs": [{"title": "T", "text": "B."}],
                 "negative_ctxs": [], "hard_negative_ctxs": [{"title": "U", "text": "C."}]}]  # fmt: skip
    trained = questions.read_questions(write_questions(tmp_path / "t.json", training))
    assert (trained.cases, list(trained.documents)) == ([questions.Case("b?", ("B",), ("T",))], ["T", "U"])
    own = questions.read_questions(
        write_questions(tmp_path / "own.jsonl", [{"question": "q", "answer": "a", "documents": ["x"]}])
    )
    assert own.cases == [questions.Case("q", ("a",), ("x",))] and not own.documents


def test_reads_a_folder_as_one_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    write_questions(folder / "a.json", HOTPOT)
    write_questions(folder / "corpus.json", {"Ann": ["Ann is."]})
    write_questions(folder / "b.jsonl", DPR)
    dataset = questions.read_questions(folder)
    assert (dataset.name, len(dataset.cases)) == ("both", 3)


def test_held_out_passages(tmp_path: Path) -> None:
    dataset = questions.read_questions(write_questions(tmp_path / "hotpot.json", HOTPOT))
    assert dataset.held_out(1.0) == {"Ann", "Bob"}, "passages that no question needs are kept"
    assert len(dataset.held_out(0.5)) == 1 and dataset.held_out(0.0) == set()
    assert dataset.held_out(0.5, 1) == dataset.held_out(0.5, 1)
    cases = questions.sample_cases([questions.Case(str(i)) for i in range(50)], 10)
    assert len(set(cases)) == 10 and cases == questions.sample_cases([questions.Case(str(i)) for i in range(50)], 10)


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
        b'[{"question": "x", "answers": [null]}]',
        b'[{"question": "x", "answers": "Paris", "ctxs": []}]',
        b'[{"question": "x", "documents": "d"}]',
        b'[{"question": "x", "together": "yes"}]',
        b'[{"question": "x", "answer": null, "context": [], "supporting_facts": []}]',
        b'[{"question": "x", "answer": "y", "context": [], "supporting_facts": [["T", 0]]}]',
        b'{"no": "data"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_refuses_files_without_questions(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.json"):
        questions.read_questions(file)
    with pytest.raises(ConfigError, match="No such file"):
        questions.read_questions(tmp_path / "absent.json")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "x"}')[:-9])
    with pytest.raises(ConfigError, match=r"cut\.jsonl\.gz"):
        questions.read_questions(tmp_path / "cut.jsonl.gz")


def test_passages_with_the_same_title_get_distinct_ids(tmp_path: Path) -> None:
    def squad(*contexts: str) -> dict[str, Any]:
        return {"data": [{"paragraphs": [{"context": c, "qas": [{"question": c, "answers": []}]} for c in contexts]}]}

    folder = tmp_path / "untitled"
    folder.mkdir()
    write_questions(folder / "a.json", squad("one", "two"))
    write_questions(folder / "b.json", squad("three", "two"))
    dataset = questions.read_questions(folder)
    assert {c.question: dataset.documents[c.documents[0]]["text"] for c in dataset.cases} == {
        t: t for t in ("one", "two", "three")
    }
    again = [{**HOTPOT[0], "context": [["Ann", ["Another."]], *HOTPOT[0]["context"][1:]]}]
    hotpot = questions.read_questions(write_questions(tmp_path / "h.json", HOTPOT + again))
    assert [c.documents for c in hotpot.cases] == [("Ann", "Bob"), ("Ann (2)", "Bob")]


def test_reads_bom_blank_lines_and_unicode_line_separators(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    first = '{"question": "a\u2028b\u0085c", "answers": [1901, "x"]}'
    second = '{"question": "d", "documents": [7], "together": true}'
    file.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\n{second}".encode())
    assert questions.read_questions(file).cases == [
        questions.Case("a\u2028b\u0085c", ("1901", "x")),
        questions.Case("d", (), ("7",), together=True),
    ]


def test_split_cases() -> None:
    cases = [questions.Case(str(i)) for i in range(53)]
    asked, searched = questions.split_cases(cases, 50, 500)
    assert (len(asked), len(searched)) == (26, 27)
    assert not set(asked) & set(searched)
    assert questions.split_cases(cases, 10, 20)[0] == asked[:10], "the order depends on the seed, not on the count"
    assert questions.split_cases(cases[:1], 5, 5) == (cases[:1], cases[:1])
    assert [len(part) for part in questions.split_cases(cases, 0, 5)] == [0, 5]


def test_scores_follow_squad() -> None:
    assert scoring.normalised("The Cat, [1] an  apple!") == "cat apple"
    assert scoring.exact_match("The sharks [2].", ["sharks"])
    assert not scoring.exact_match("some sharks", ["sharks"])
    assert scoring.contains("It was 1901, of course [1, 2].", ["in 1900", "1901"])
    assert not scoring.contains("It was 19012.", ["1901"])
    assert not scoring.contains("anything", ["the"]), "an empty normalised answer matches no text"
    assert scoring.f1("with the big sharks", ["sharks"]) == 0.5
    assert scoring.f1("", ["sharks"]) == 0.0
    assert scoring.f1("anything", []) == 0.0


def test_scores_of_scripts_without_spaces() -> None:
    assert scoring.contains("日本の首都は東京です。 [1]", ["東京"])
    assert scoring.contains("กรุงเทพเป็นเมืองหลวง", ["กรุงเทพ"])
    assert scoring.exact_match("「東京」", ["東京"])
    assert scoring.f1("東京都", ["東京"]) == pytest.approx(0.8)
    assert not scoring.contains("東", ["東京"])


@given(st.text(), st.text())
def test_scores_are_bounded_and_symmetric(a: str, b: str) -> None:
    assert 0.0 <= scoring.f1(a, [b]) <= 1.0
    assert scoring.f1(a, [b]) == scoring.f1(b, [a])
    assert scoring.exact_match(a, [a])
    if scoring.exact_match(a, [b]):
        assert scoring.f1(a, [b]) == 1.0
