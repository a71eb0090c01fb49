"""Encoder for BM25: term frequencies of word stems, without a model or a stored vocabulary."""

import functools
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import RetrievalError
from ..sparse_vectors import SparseVectors
from ..text_normalization import is_unspaced, terms, word_spans
from .tokenization import Progress, split_by_spans

STEMS = "stems"
# Lucene's English stop words.
STOP = frozenset(
    """a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
    to was will with""".split()  # noqa: SIM905
)


class StemEncoder:
    """Encoder of texts to term frequencies of stems.

    The term id of a stem is a 31-bit checksum. Among a million stems, about two hundred pairs collide.
    """

    name = STEMS
    dimension = 1 << 31

    def __init__(self, language: str) -> None:
        """Create an encoder for a language of Snowball, or for unstemmed words (`none`).

        Raises:
            RetrievalError: The language is unknown, or the stemmer is not installed.
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
        stemmer, mutex = snowballstemmer.stemmer(language), threading.Lock()  # the stemmer is not thread-safe

        @functools.lru_cache(maxsize=1 << 18)
        def stem(word: str) -> str:
            with mutex:
                return stemmer.stemWord(word)

        self._stem = stem

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenization and the language."""
        return f"stems-2-{self.language}"

    def stems(self, text: str, query: bool = False) -> list[str]:
        """Return the stems of a text: those of its words, and bigrams of languages without spaces."""
        words = terms(text, query)
        if self.language == "english":
            words = [w for w in words if w not in STOP]
        return [w if is_unspaced(w) else self._stem(w) for w in words]

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> SparseVectors:
        """Count the stems of each text."""
        rows = self._counted(documents, query=False)
        if progress is not None:
            progress(len(documents))
        return rows

    def encode_queries(self, queries: Sequence[str]) -> SparseVectors:
        """Count the stems of each query."""
        return self._counted(queries, query=True)

    def _counted(self, texts: Sequence[str], query: bool) -> SparseVectors:
        rows = [{stem_id(s): float(n) for s, n in Counter(self.stems(t, query)).items()} for t in texts]
        return SparseVectors.from_dicts(rows)

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Split a text into chunks of at most ``size`` words; consecutive chunks share ``overlap`` words."""
        return split_by_spans(text, word_spans(text), size, overlap)


def stem_id(stem: str) -> int:
    """Return the term id of a stem."""
    return zlib.crc32(stem.encode()) & 0x7FFFFFFF


@functools.lru_cache(maxsize=8)
def load_stem_encoder(language: str) -> StemEncoder:
    """Return the cached encoder of a language; see `StemEncoder`."""
    return StemEncoder(language)
