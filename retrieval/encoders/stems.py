"""Texts as counted stems of their words, for BM25: no model, and no vocabulary that would have to be kept."""

import functools
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import RetrievalError
from ..sparse_vectors import SparseVectors
from .tokenization import Progress, truncate_text

STEMS = "stems"
WORD = re.compile(r"\w+", re.UNICODE)
# Lucene's English stop words.
STOP = frozenset(
    """a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
    to was will with""".split()  # noqa: SIM905
)


class StemEncoder:
    """Counts stems.

    A stem's number is a checksum of it: of a million stems some two hundred pairs share one.
    """

    name = STEMS
    dimension = 1 << 31

    def __init__(self, language: str) -> None:
        """For a language of Snowball's, or `none` for words as they are.

        Raises:
            RetrievalError: there is no such language, or no stemmer.
        """
        self.language = language
        self._stem: Callable[[str], str] = str
        if language == "none":
            return
        try:
            import snowballstemmer
        except ImportError:
            raise RetrievalError("bm25 needs a stemmer; pip install pilotfish[retrieval]") from None
        if language not in snowballstemmer.algorithms():
            known = ", ".join(sorted(snowballstemmer.algorithms()))
            raise RetrievalError(f"language {language}: expected none, {known}")
        stemmer, mutex = snowballstemmer.stemmer(language), threading.Lock()  # which keeps the word it is at

        @functools.lru_cache(maxsize=1 << 18)
        def stem(word: str) -> str:
            with mutex:
                return stemmer.stemWord(word)

        self._stem = stem

    @property
    def fingerprint(self) -> str:
        """The way words are taken."""
        return f"stems-1-{self.language}"

    def stems(self, text: str) -> list[str]:
        """The stems of a text, in order."""
        found = WORD.findall(text.lower())
        if self.language == "english":
            found = [w for w in found if w not in STOP]
        return [self._stem(w) for w in found]

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> SparseVectors:
        """How often each text has each stem."""
        rows = [{stem_id(s): float(n) for s, n in Counter(self.stems(t)).items()} for t in documents]
        if progress is not None:
            progress(len(rows))
        return SparseVectors.from_dicts(rows)

    def encode_queries(self, queries: Sequence[str]) -> SparseVectors:
        """As documents are."""
        return self.encode_documents(queries)

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Pieces of a text of at most ``size`` words, each with ``overlap`` of the one before."""
        return truncate_text(text, [m.span() for m in WORD.finditer(text)], size, overlap)


def stem_id(stem: str) -> int:
    """Of a stem."""
    return zlib.crc32(stem.encode()) & 0x7FFFFFFF


@functools.lru_cache(maxsize=8)
def load_stem_encoder(language: str) -> StemEncoder:
    """The encoder of a language; see `StemEncoder`."""
    return StemEncoder(language)
