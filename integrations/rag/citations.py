"""Which passages an answer stands on."""

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from .prompt import CITATION, PromptPassage

SHARE = 0.6  # of a sentence's words that a passage must have to be named for it
MOST = 100  # passages that one citation can stand for
_PART = regex.compile(r"(\d{1,3})(?:\s*[-‑–—]\s*(\d{1,3}))?")
_SENTENCE = regex.compile(r"[^.!?。！？\n]+[.!?。！？]*")
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
_WORD = regex.compile(r"\w{3,}|" + _UNSPACED.pattern)


@dataclass(frozen=True)
class Citation:
    """A place in an answer that names passages.

    Attributes:
        begin: Its first character.
        end: The one behind its last.
        numbers: Of the passages.
    """

    begin: int
    end: int
    numbers: Sequence[int]


def find_citations(answer: str, passages: Sequence[PromptPassage]) -> list[Citation]:
    """All citations of an answer, as ``[1]``, ``[2, 3]``, ``[Passage 1]``, ``[1-3]``.

    Numbers of passages that are none are left out, and citations of none such.
    """
    known = {p.number for p in passages}
    found = []
    for match in CITATION.finditer(answer):
        numbers: dict[int, None] = {}
        for first, last in _PART.findall(match["numbers"]):
            begin, end = int(first), int(last or first)
            numbers |= dict.fromkeys(n for n in range(begin, min(end, begin + MOST) + 1) if n in known)
        if numbers:
            found.append(Citation(match.start(), match.end(), list(numbers)))
    return found


def attribute_sentences(answer: str, passages: Sequence[PromptPassage]) -> list[int]:
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


def spaced(text: str) -> str:
    """A text with spaces around each character of scripts that put none between words."""
    return _UNSPACED.sub(r" \g<0> ", text)


def _words(text: str) -> list[str]:
    return [w.lower() for w in _WORD.findall(spaced(text))]
