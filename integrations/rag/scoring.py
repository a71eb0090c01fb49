"""Scores of answers against the known answers of a dataset, as in SQuAD's evaluation script (arXiv 1606.05250).

As in MLQA (arXiv 1910.07475), punctuation of all scripts is removed, and scripts without spaces between words are
compared character by character.
"""

from collections import Counter
from collections.abc import Iterable

import regex

from .citations import spaced
from .prompt import CITATION

_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_NAMED = regex.compile(r"\bpassage\s*(?=[\[【])", regex.IGNORECASE)
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")  # the symbols are punctuation in Python's `string`, and in SQuAD


def normalised(text: str) -> str:
    """Return a text in lower case, without citations, punctuation, articles and repeated spaces."""
    plain = _PUNCTUATION.sub("", CITATION.sub(" ", _NAMED.sub(" ", text)).lower())
    return " ".join(_ARTICLES.sub(" ", spaced(plain)).split())


def exact_match(answer: str, golds: Iterable[str]) -> bool:
    """Return whether an answer equals one of the known answers after normalisation."""
    return any(normalised(answer) == normalised(gold) for gold in golds)


def contains(text: str, golds: Iterable[str]) -> bool:
    """Return whether a text contains one of the known answers, word by word."""
    padded = f" {normalised(text)} "
    return any(f" {gold} " in padded for g in golds if (gold := normalised(g)))


def f1(answer: str, golds: Iterable[str]) -> float:
    """Return the largest F1 score over the known answers: the harmonic mean of precision and recall of the words."""
    return max((_f1(normalised(answer).split(), normalised(gold).split()) for gold in golds), default=0.0)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))
