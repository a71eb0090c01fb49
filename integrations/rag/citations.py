"""Which passages an answer stands on."""

import re
from collections.abc import Sequence

from .prompt import Passage

SHARE = 0.6  # of a sentence's words that a passage must have to be named for it
_NUMBERS = re.compile(r"\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_WORD = re.compile(r"\w{3,}")


def cited(answer: str, passages: Sequence[Passage]) -> list[int]:
    """Numbers of passages that the answer names, in its order; those that are none are left out."""
    known = {p.number for p in passages}
    numbers = (int(n) for found in _NUMBERS.findall(answer) for n in found.split(","))
    return [n for n in dict.fromkeys(numbers) if n in known]


def attributed(answer: str, passages: Sequence[Passage]) -> list[int]:
    """For an answer that names none: for each sentence the passage that has most of its words, if that is most of them.

    A guess from words, and shown as one.
    """
    words = {p.number: set(_words(p.text)) for p in passages}
    found = []
    for sentence in _SENTENCE.findall(answer):
        said = set(_words(sentence))
        if said and words:
            shares = {number: len(said & theirs) / len(said) for number, theirs in words.items()}
            best = max(shares, key=lambda number: shares[number])
            if shares[best] >= SHARE:
                found.append(best)
    return list(dict.fromkeys(found))


def _words(text: str) -> list[str]:
    return [w.lower() for w in _WORD.findall(text)]
