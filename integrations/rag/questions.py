"""Question sets: questions with their answers and passages, from files in the formats of common datasets."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...plugins.config import ConfigError

GOLD = ("has_answer", "hasanswer", "isgold")  # flags of a passage that contains the answer
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Case:
    """A question with its known answers.

    Attributes:
        question: Text of the question.
        answers: Correct answers; none if the documents do not contain the answer.
        documents: Ids of the documents that contain the answer; none if they are not known.
        together: Whether the answer needs all of the documents; else any one of them contains it.
    """

    question: str
    answers: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    together: bool = False


@dataclass
class QuestionSet:
    """The questions and passages of one dataset.

    Attributes:
        name: Name of the dataset.
        cases: Questions.
        documents: Passages by id, each with ``id``, ``text`` and ``metadata``.
    """

    name: str
    cases: list[Case] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)

    def held_out(self, share: float, seed: int = 0) -> set[str]:
        """Sample the ids of passages to hold out of an index, so that some questions are unanswerable.

        Only passages that a question needs are held out.

        Args:
            share: Share of those passages to hold out.
            seed: Seed of the sample.
        """
        needed = sorted({d for case in self.cases for d in case.documents})
        return set(random.Random(seed).sample(needed, round(share * len(needed))))

    def indexed_documents(self, share: float, seed: int = 0) -> list[dict[str, Any]]:
        """Return the passages for an index, without those of `held_out`."""
        excluded = self.held_out(share, seed)
        return [document for id, document in self.documents.items() if id not in excluded]


def read_questions(path: Path) -> QuestionSet:
    """Read the questions of a file, or of all files in a folder.

    The formats are:

    - SQuAD: articles with paragraphs with questions (``data``, ``paragraphs``, ``qas``); questions with
      ``is_impossible`` have no answer.
    - HotpotQA: a list of objects with ``question``, ``answer``, ``context`` and ``supporting_facts``.
    - DPR: a list or lines of objects with ``question``, ``answers`` and ``ctxs``, of which passages with
      ``has_answer``, ``hasanswer`` or ``isgold`` contain the answer; or with ``positive_ctxs``, which all contain it,
      ``negative_ctxs`` and ``hard_negative_ctxs``.
    - Lines of objects with ``question`` and optionally ``answers`` and ``documents``: ids of documents in your own
      index, any of which contains the answer, or with ``together: true`` all of which are needed.

    Different passages with the same title get numbers.

    Raises:
        ConfigError: A file cannot be read, or no file contains questions.
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
        raise ConfigError(f"{path}: contains no questions")
    return collection


def sample_cases(cases: Sequence[Case], count: int, seed: int = 0) -> list[Case]:
    """Return a random sample of at most ``count`` questions."""
    return random.Random(seed).sample(list(cases), min(count, len(cases)))


def split_cases(cases: Sequence[Case], count: int, more: int, seed: int = 0) -> tuple[list[Case], list[Case]]:
    """Split questions into two random samples without common questions; a single question is in both.

    Args:
        cases: Questions.
        count: Largest size of the first sample, which is at most half of the questions.
        more: Largest size of the second sample.
        seed: Seed of the samples.
    """
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
        yield from whole  # other JSON files in such a folder, such as a corpus, are not lists


def _take(item: Any, to: QuestionSet) -> None:
    """Add the questions and passages of an item to a question set."""
    if not isinstance(item, dict):
        raise ValueError("an item is not an object")
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
    """Build a question from validated values."""
    if not isinstance(question, str):
        raise ValueError(f"question: expected a text, got {question!r}")
    for name, values in (("answers", answers), ("documents", documents)):
        if not isinstance(values, list) or not all(type(v) in (str, int, float) for v in values):
            raise ValueError(f"{name}: expected a list of texts, got {values!r}")
    return Case(question, tuple(map(str, answers)), tuple(dict.fromkeys(map(str, documents))), together)


def _document(to: QuestionSet, name: str, text: str, title: str) -> str:
    """Add a passage and return its id: its name, with a number if another passage has that name."""
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f"expected a title and a text of a passage, got {name!r} and {type(text).__name__}")
    id, number = name, 1
    while (known := to.documents.get(id)) is not None and known["text"] != text:
        number += 1
        id = f"{name} ({number})"
    to.documents[id] = {"id": id, "text": text, "metadata": {"title": title}}
    return id
