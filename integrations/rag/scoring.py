"""Answers against those of a dataset, as SQuAD scores them (arXiv 1606.05250, its evaluation script)."""

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CITATION = re.compile(r"\[\d{1,3}(?:\s*,\s*\d{1,3})*\]|\bpassage(?=\s*\[)", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Without citations, case, punctuation, articles and further spaces."""
    plain = _CITATION.sub(" ", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, golds: Iterable[str]) -> bool:
    """Whether an answer is one of the known ones."""
    return any(normalised(answer) == normalised(gold) for gold in golds)


def contains(text: str, golds: Iterable[str]) -> bool:
    """Whether a text holds one of the known answers, word by word."""
    padded = f" {normalised(text)} "
    return any(f" {gold} " in padded for g in golds if (gold := normalised(g)))


def f1(answer: str, golds: Iterable[str]) -> float:
    """The harmonic mean of precision and recall over words, with the known answer that fits best."""
    return max((_f1(normalised(answer).split(), normalised(gold).split()) for gold in golds), default=0.0)


def _f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    both = sum((Counter(said) & Counter(gold)).values())
    return 2 * both / (len(said) + len(gold))
