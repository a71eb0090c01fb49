"""Questions with their answers, and the passages that came with them, from files that others wrote."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...plugins.config import ConfigError

GOLD = ("has_answer", "hasanswer", "isgold")  # of a passage that holds the answer
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Case:
    """A question.

    Attributes:
        question: What is asked.
        answers: Any of which is right; none where the documents cannot answer.
        documents: Ids of those that hold the answer; none where that is not known.
        together: Whether the answer needs all of them; else any one of them holds it.
    """

    question: str
    answers: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    together: bool = False


@dataclass
class QuestionSet:
    """Questions of one dataset, and its passages: ``{"id", "text", "metadata"}`` each."""

    name: str
    cases: list[Case] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)

    def held_out(self, share: float, seed: int = 0) -> set[str]:
        """Ids of passages to be left out of an index, so that some questions have no answer there.

        Passages that no question needs stay.
        """
        needed = sorted({d for case in self.cases for d in case.documents})
        return set(random.Random(seed).sample(needed, round(share * len(needed))))

    def indexed_documents(self, share: float, seed: int = 0) -> list[dict[str, Any]]:
        """Passages for an index, without those that `held_out` names."""
        away = self.held_out(share, seed)
        return [document for id, document in self.documents.items() if id not in away]


def read_questions(path: Path) -> QuestionSet:
    """Questions of a file, or of those in a folder, in one of these forms.

    - SQuAD: articles of paragraphs of questions (``data``, ``paragraphs``, ``qas``); those marked ``is_impossible``
      have no answer.
    - HotpotQA: a list of ``question``, ``answer``, ``context``, ``supporting_facts``.
    - DPR: a list or lines of ``question``, ``answers``, ``ctxs`` (each passage with ``has_answer``, ``hasanswer`` or
      ``isgold`` holds the answer), or ``positive_ctxs`` (which all do), ``negative_ctxs``, ``hard_negative_ctxs``.
    - Lines of ``question`` and maybe ``answers`` and ``documents``, ids in one's own index each of which holds the
      answer, or with ``together: true`` all of them.

    Passages of one name that differ are numbered.

    Raises:
        ConfigError: a file cannot be read, or none holds questions.
    """
    files = [f for f in sorted(path.iterdir()) if f.name.endswith(ENDINGS)] if path.is_dir() else [path]
    collection = QuestionSet(path.name if path.is_dir() else path.name.partition(".")[0])
    try:
        for file in files:
            for item in _items(file):
                _take(item, collection)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, zlib.error, RecursionError) as error:
        raise ConfigError(f"{path}: not a file of questions ({error})") from None
    if not collection.cases:
        raise ConfigError(f"{path}: holds no questions")
    return collection


def sample_cases(cases: Sequence[Case], count: int, seed: int = 0) -> list[Case]:
    """``count`` of them, drawn by a seed."""
    return random.Random(seed).sample(list(cases), min(count, len(cases)))


def split_cases(cases: Sequence[Case], count: int, more: int, seed: int = 0) -> tuple[list[Case], list[Case]]:
    """``count`` of them, but at most half, and ``more`` of the others; of a single one both."""
    mixed = sample_cases(cases, len(cases), seed)
    count = min(count, len(mixed) // 2 if len(mixed) > 1 else 1)
    return mixed[:count], mixed[count:][:more] or mixed[:more]


def _items(file: Path) -> Iterator[Any]:
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    if file.name.removesuffix(".gz").endswith(".jsonl"):
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
        return
    whole = json.loads(text)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        for article in whole["data"]:
            for number, paragraph in enumerate(article["paragraphs"]):
                yield {"article": article.get("title", ""), "number": number, **paragraph}
    elif isinstance(whole, list):
        yield from whole  # other files of such a folder, as a corpus, are no lists


def _take(item: Any, to: QuestionSet) -> None:
    """Put what an item holds into a collection."""
    if not isinstance(item, dict):
        raise ValueError("an item is no object")
    if "qas" in item:
        article = item["article"] or "document"
        id = _document(to, f"{article}/{item['number']}", item["context"], article)
        for asked in item["qas"]:
            answers = [] if asked.get("is_impossible") else [a["text"] for a in asked["answers"]]
            to.cases.append(_case(asked["question"], answers, [id]))
    elif "supporting_facts" in item:
        ids = {title: _document(to, title, "".join(sentences), title) for title, sentences in item["context"]}
        facts = [ids[title] for title, _ in item["supporting_facts"]]
        to.cases.append(_case(item["question"], [item["answer"]], facts, together=True))
    elif "ctxs" in item or "positive_ctxs" in item:
        gold = []
        for field in ("ctxs", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"):
            for passage in item.get(field, []):
                title = passage["title"]
                id = _document(to, title, f"{title}. {passage['text']}", title)
                if field == "positive_ctxs" or any(passage.get(flag) for flag in GOLD):
                    gold.append(id)
        to.cases.append(_case(item["question"], item["answers"], gold))
    elif "question" in item:
        answers = item.get("answers", [item["answer"]] if "answer" in item else [])
        together = item.get("together", False)
        if not isinstance(together, bool):
            raise ValueError("together: expected true or false")
        to.cases.append(_case(item["question"], answers, item.get("documents", []), together))
    else:
        raise ValueError(f"an item has no question, but {', '.join(sorted(map(str, item))[:8]) or 'nothing'}")


def _case(question: Any, answers: Any, documents: Any, together: bool = False) -> Case:
    """A question, checked."""
    if not isinstance(question, str):
        raise ValueError(f"question: expected a text, got {question!r}")
    for what, given in (("answers", answers), ("documents", documents)):
        if not isinstance(given, list) or not all(type(g) in (str, int, float) for g in given):
            raise ValueError(f"{what}: expected a list of texts, got {given!r}")
    return Case(question, tuple(map(str, answers)), tuple(dict.fromkeys(map(str, documents))), together)


def _document(to: QuestionSet, name: str, text: str, title: str) -> str:
    """The id of a passage, by its name where that is free; the same text twice is one."""
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f"a passage has a title and a text, not {name!r} and {type(text).__name__}")
    id, number = name, 1
    while (known := to.documents.get(id)) is not None and known["text"] != text:
        number += 1
        id = f"{name} ({number})"
    to.documents[id] = {"id": id, "text": text, "metadata": {"title": title}}
    return id
