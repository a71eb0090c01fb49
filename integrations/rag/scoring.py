"""Answers against those of a dataset, as SQuAD scores them (arXiv 1606.05250, its evaluation script).

Beyond it, as MLQA does (arXiv 1910.07475): punctuation of all scripts is left out, and scripts that put no spaces
between words are compared character by character.
"""

from collections import Counter
from collections.abc import Iterable

import regex

from .citations import spaced
from .prompt import CITATION

_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_NAMED = regex.compile(r"\bpassage\s*(?=[\[【])", regex.IGNORECASE)
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")  # the latter are punctuation to Python's `string`, and to SQuAD


def normalised(text: str) -> str:
    """Without citations, case, punctuation, articles and further spaces."""
    plain = _PUNCTUATION.sub("", CITATION.sub(" ", _NAMED.sub(" ", text)).lower())
    return " ".join(_ARTICLES.sub(" ", spaced(plain)).split())


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
