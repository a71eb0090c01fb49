"""Normalization of texts for matching: Unicode NFKC and case folding, and words of languages without spaces.

Stored texts are never changed. `map_fold` maps positions in a folded text to the original one.
"""

import functools
import unicodedata
from collections.abc import Iterator

import regex

# Scripts that are written without spaces, or in which a word is only a part of what stands between spaces.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー々"
_RUN = regex.compile(rf"(?V1)(?P<unspaced>[{_UNSPACED}]+)|(?P<word>[[\w\p{{M}}]--[{_UNSPACED}]]+)")
_DOTTED_I = "i\u0307"  # case folding of the Turkish capital I with dot


def fold(text: str) -> str:
    """Return a text in the form in which texts are compared: NFKC, case-folded."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", folded).replace(_DOTTED_I, "i")


def terms(text: str, query: bool = False) -> list[str]:
    """Split a text into folded terms.

    Runs of Han, Kana, Hangul, Thai and similar scripts become bigrams of characters, as in Lucene's CJK analyzer. In
    documents the single characters are terms, too, so that a query of one character finds them.

    Args:
        text: Text of a document or a query.
        query: Whether the text is a query.
    """
    found: list[str] = []
    folded = fold(text)
    for begin, end, unspaced in runs(folded):
        run = folded[begin:end]
        if not unspaced or len(run) == 1:
            found.append(run)
        else:
            found += (run[i : i + 2] for i in range(len(run) - 1))
            if not query:
                found += run
    return found


def is_unspaced(term: str) -> bool:
    """Return whether a term is of a script without spaces, which has no stems."""
    match = _RUN.match(term)
    return match is not None and match.lastgroup == "unspaced"


def runs(text: str) -> Iterator[tuple[int, int, bool]]:
    """Iterate over (begin, end, whether it is of a script without spaces) of the words and runs of a text."""
    for match in _RUN.finditer(text):
        yield (*match.span(), match.lastgroup == "unspaced")


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the positions of words in a text; each character of a script without spaces is a word."""
    spans: list[tuple[int, int]] = []
    for begin, end, unspaced in runs(text):
        spans += ((i, i + 1) for i in range(begin, end)) if unspaced else [(begin, end)]
    return spans


def map_fold(text: str) -> tuple[str, list[int]]:
    """Return the folded text, and for each of its characters (and its end) the position in the original text.

    The text is folded in pieces of a character with its combining marks, whose folding does not depend on others.
    """
    if text.isascii():
        return text.lower(), list(range(len(text) + 1))
    folded: list[str] = []
    positions: list[int] = []
    begin = 0
    while begin < len(text):
        end = begin + 1
        while end < len(text) and _joins(text[end]):
            end += 1
        piece = fold(text[begin:end])
        folded.append(piece)
        positions += [begin] * len(piece)
        begin = end
    return "".join(folded), [*positions, len(text)]


@functools.lru_cache(maxsize=1 << 16)
def _joins(character: str) -> bool:
    """Return whether NFKC may join a character with the one before it."""
    return bool(unicodedata.combining(character)) or "\u1160" <= character <= "\u11ff" or character in "\uff9e\uff9f"
