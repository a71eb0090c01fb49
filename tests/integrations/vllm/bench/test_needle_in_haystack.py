"""Needle-in-a-haystack questions: construction, and scoring equivalent to greedy decoding; benchmark corpora."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pilotfish.integrations.vllm.bench import corpora, needle_in_haystack
from pilotfish.integrations.vllm.bench.needle_in_haystack import NeedleQuestion, NeedleResult
from pilotfish.plugins.config import ConfigError


class CharacterTokenizer:
    """Tokenizer whose tokens are characters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(map(ord, text))}


def decoded(ids: list[int]) -> str:
    """Return the text of token ids."""
    return "".join(map(chr, ids))


HAY = "".join(chr(ord("a") + i % 7) for i in range(3000))


def test_needle_occurs_once_at_its_depth_in_a_context_of_the_given_length() -> None:
    groups = list(needle_in_haystack.needle_questions(CharacterTokenizer(), HAY, 1000, seed=3))
    assert len(groups) == needle_in_haystack.DEPTHS
    for step, group in enumerate(groups):
        assert len({decoded(q.text) for q in group}) == needle_in_haystack.ROUNDS, "different cities"
        for q in group:
            context, number = decoded(q.context), decoded(q.answer)
            assert len(q.context) == 1000
            assert len(number) == 7 and number.isdigit()
            assert context.count(number) == 1
            assert decoded(q.text).endswith("number is: ")
            needle = context.index("\nThe special")
            length = context.index(number) + len(number) + 2 - needle
            assert q.depth == step / (needle_in_haystack.DEPTHS - 1)
            assert needle == round(q.depth * (1000 - length))


def test_needles_depend_on_the_seed_only() -> None:
    first, again, other = (
        list(needle_in_haystack.needle_questions(CharacterTokenizer(), HAY, 500, seed=s)) for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_questions_of_a_round_share_their_prefix_up_to_the_needle() -> None:
    groups = list(needle_in_haystack.needle_questions(CharacterTokenizer(), HAY, 1000, seed=0))
    for before, after in itertools.pairwise(groups):
        for a, b in zip(before, after, strict=True):
            at = decoded(a.context).index("\nThe special")
            assert a.context[:at] == b.context[:at]


def test_refuses_short_haystack() -> None:
    with pytest.raises(ConfigError, match="the haystack has 3000 tokens, more than 3000 are needed"):
        list(needle_in_haystack.needle_questions(CharacterTokenizer(), HAY, 3000, seed=0))


def test_refuses_context_too_short_for_a_needle() -> None:
    with pytest.raises(ConfigError, match="64 tokens at least, got 10"):
        list(needle_in_haystack.needle_questions(CharacterTokenizer(), HAY, 10, seed=0))


@pytest.mark.parametrize(
    "row",
    [
        {"ordered_kv_records": [["a", "b", "c"]], "key": "a", "value": "b"},
        {"ordered_kv_records": [["a", "b"]], "key": "x", "value": "b"},
        {"ordered_kv_records": [["a", 1]], "key": "a", "value": 1},
        {"ordered_kv_records": 3, "key": "a", "value": "b"},
    ],
)
def test_refuses_malformed_dictionaries(tmp_path: Path, row: dict) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="not a file of dictionaries"):
        needle_in_haystack.dictionary_questions(CharacterTokenizer(), path, 1, 100)


def dictionary_file(path: Path, keys: int) -> Path:
    """Write six dictionaries of ``keys`` entries each."""
    lines = []
    for i in range(6):
        pairs = [[f"key-{i}-{j}", f"value-{i}-{j}"] for j in range(keys)]
        lines.append(json.dumps({"ordered_kv_records": pairs, "key": pairs[i % keys][0], "value": pairs[i % keys][1]}))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_dictionaries_are_truncated_but_keep_the_requested_key(tmp_path: Path) -> None:
    path = dictionary_file(tmp_path / "d.jsonl.gz", 40)
    whole = needle_in_haystack.dictionary_questions(CharacterTokenizer(), path, 3, 10_000)
    short = needle_in_haystack.dictionary_questions(CharacterTokenizer(), path, 3, 400)
    for q, s in zip(whole, short, strict=True):
        assert decoded(q.context).count("key-") == 40
        assert 1 < decoded(s.context).count("key-") < 40
        assert len(s.context) + len(s.text) + len(s.answer) <= 400
        for question in (q, s):
            key = decoded(question.text).split('"')[1]
            assert f'"{key}": "{decoded(question.answer)}"' in decoded(question.context)
            assert 0 <= question.depth <= 1


@pytest.mark.parametrize("content", ["{}\n", "no json\n", '{"ordered_kv_records": [], "key": "a"}\n'])
def test_refuses_files_without_dictionaries(tmp_path: Path, content: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="not a file of dictionaries"):
        needle_in_haystack.dictionary_questions(CharacterTokenizer(), path, 1, 100)
    with pytest.raises(ConfigError, match="No such file"):
        needle_in_haystack.dictionary_questions(CharacterTokenizer(), tmp_path / "none", 1, 100)


class FakeEngine:
    """Fake engine that is right at some answer tokens."""

    def ask(self, do: str, prompts: list, texts: list, keep: Any) -> dict[str, Any]:
        assert (do, keep) == ("forced", None)
        return {"right": [[False] * (len(t) - 2) + [True, t[-1] == 9] for t in texts]}


def test_needle_recall_counts_complete_answers() -> None:
    questions = [NeedleQuestion([1], [2, 3], [4, 9], 0.0), NeedleQuestion([1], [2], [4, 5], 1.0)]
    results = needle_in_haystack.answer_questions(FakeEngine(), questions)
    assert results == [NeedleResult(True, 1.0), NeedleResult(False, 0.5)]
    records = needle_in_haystack.needle_records(
        "pg_essays", "needle_recall", "arm", list(zip(questions, results, strict=True)), 100
    )
    values = {(r.metric, r.params.get("depth")): r.value for r in records}
    assert values == {
        ("needle_recall", None): 0.5,
        ("token_recall", None): 0.75,
        ("needle_recall_at_depth", 0.0): 1.0,
        ("needle_recall_at_depth", 1.0): 0.0,
    }


def test_sample_corpus_is_long_prose() -> None:
    text = corpora.sample_corpus()
    assert len(text) > 200_000
    assert "expression" in text


def test_excerpts_are_evenly_spaced() -> None:
    text = "".join(chr(i) for i in range(10, 1010))
    assert corpora.excerpts(CharacterTokenizer(), text, 4, 50, "x") == [
        list(range(10 + s, 60 + s)) for s in (0, 250, 500, 750)
    ]
    assert corpora.excerpts(CharacterTokenizer(), text, 4, 400, "x") == [
        list(range(10 + s, 410 + s)) for s in (0, 200, 400, 600)
    ]
    with pytest.raises(ConfigError, match="x: 1000 tokens, at least 1004 are needed"):
        corpora.excerpts(CharacterTokenizer(), text, 4, 1000, "x")


def test_corpus_folder_is_read_in_order_of_file_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert corpora.read_corpus(tmp_path) == "a.txt\n\nb.txt"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="there is no text"):
        corpora.read_corpus(empty)
