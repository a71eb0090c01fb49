"""Citations in an answer, and attribution of sentences to supporting passages."""

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from .prompt import CITATION, PromptPassage

SHARE = 0.6  # smallest share of a sentence's words that a passage must contain to be attributed
MOST = 100  # largest range of passages in one citation
_PART = regex.compile(r"(\d{1,3})(?:\s*[-‑–—]\s*(\d{1,3}))?")
_SENTENCE = regex.compile(r"[^.!?。！？\n]+[.!?。！？]*")
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
_WORD = regex.compile(r"\w{3,}|" + _UNSPACED.pattern)


@dataclass(frozen=True)
class Citation:
    """A citation in an answer.

    Attributes:
        begin: Index of the first character.
        end: Index after the last character.
        numbers: Numbers of the cited passages.
    """

    begin: int
    end: int
    numbers: Sequence[int]


def find_citations(answer: str, passages: Sequence[PromptPassage]) -> list[Citation]:
    """Find all citations of an answer, such as ``[1]``, ``[2, 3]``, ``[Passage 1]`` and ``[1-3]``.

    Numbers that are not those of a passage are ignored.
    """
    known = {p.number for p in passages}
    results = []
    for match in CITATION.finditer(answer):
        numbers: dict[int, None] = {}
        for first, last in _PART.findall(match["numbers"]):
            begin, end = int(first), int(last or first)
            numbers |= dict.fromkeys(n for n in range(begin, min(end, begin + MOST) + 1) if n in known)
        if numbers:
            results.append(Citation(match.start(), match.end(), list(numbers)))
    return results


def attribute_sentences(answer: str, passages: Sequence[PromptPassage]) -> list[int]:
    """Attribute the sentences of an answer without citations to passages.

    A sentence is attributed to the passage that contains most of its words, if it contains at least `SHARE` of them.
    This is an estimate, and users see it as such.
    """
    words = {p.number: set(_words(p.text)) for p in passages}
    attributed = []
    for sentence in _SENTENCE.findall(answer):
        in_sentence = set(_words(sentence))
        if in_sentence and words:
            shares = {number: len(in_sentence & own) / len(in_sentence) for number, own in words.items()}
            best = max(shares, key=lambda number: shares[number])
            if shares[best] >= SHARE:
                attributed.append(best)
    return list(dict.fromkeys(attributed))


def spaced(text: str) -> str:
    """Return a text with spaces around each character of scripts that are written without spaces between words."""
    return _UNSPACED.sub(r" \g<0> ", text)


def _words(text: str) -> list[str]:
    return [w.lower() for w in _WORD.findall(spaced(text))]
