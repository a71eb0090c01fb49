"""What answers queries in `pilotfish bench retrieval`: our indexes, and what people use without them."""

import json
import os
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...plugins.config import ConfigError, Selection, build_options, parse_assignments
from ...plugins.dense import document_vectors
from ...plugins.manager import plugins
from ...retrieval.encoders import MINILM, vdr
from ...retrieval.token_embeddings import TokenEmbeddings
from . import baselines
from .corpus import Corpus
from .memory import PeakMemory

DEPTH = 100
EXACT = {"nprobe": 1 << 20, "impute": "kprime", "kprime": 1000}
Search = Callable[[int], Sequence[int]]  # number of a query -> numbers of documents, best first
Timed = Callable[[int], tuple[float, Sequence[int]]]  # the same, and milliseconds


@dataclass(frozen=True)
class RetrievalArm:
    """Something that answers queries."""

    name: str
    search: Timed
    build_seconds: float
    bytes: int
    postings: float = 0  # of a document
    peak_mib: float | None = None  # of building; None where another process built


def _timed(search: Search) -> Timed:
    def timed(number: int) -> tuple[float, Sequence[int]]:
        started = time.perf_counter()
        found = search(number)
        return 1e3 * (time.perf_counter() - started), found

    return timed


def parse_arm(arm: str) -> Selection:
    """An arm's name and options.

    Raises:
        ConfigError: there is no such arm.
    """
    chosen = parse_assignments(arm.replace("@exact", "").replace("@", ","))
    if "@exact" in arm and chosen.name != "xtr":
        raise ConfigError(f"arm {arm}: only xtr has @exact")
    if chosen.name not in (*OTHERS, *baselines.NAMES):
        cls: Any = plugins().get("index", chosen.name, "arm")
        _split(cls, chosen.options)
    return chosen


def _split(cls: Any, options: Any) -> tuple[Any, dict[str, Any]]:
    """Options of making an index, and those of searching it."""
    making = {k: v for k, v in options.items() if k in cls.Options.__dataclass_fields__}
    searching = {k: v for k, v in options.items() if k not in making and k != "encoder"}
    return build_options(cls.Options, making, cls.name), asdict(build_options(cls.Settings, searching, cls.name))


def make_arm(name: str, corpus: Corpus, threads: int, python: Path | None) -> RetrievalArm:
    """An arm over a collection; ``python`` has other packages, for those arms that are other packages.

    Raises:
        ConfigError: what it needs is not there.
    """
    chosen = parse_arm(name)
    started = time.perf_counter()
    if chosen.name in OTHERS:
        package, other = OTHERS[chosen.name]
        if find_spec(package) is None:
            raise ConfigError(f"arm {chosen.name} needs {package}; pip install pilotfish[bench]")
        with PeakMemory() as peak:
            search, size = other(corpus)
    elif chosen.name in baselines.NAMES:
        return _peer(name, chosen, corpus, threads, python)
    else:
        return _index(name, chosen, corpus)
    return RetrievalArm(name, _timed(search), time.perf_counter() - started, size, peak_mib=peak.mib)


def _peer(name: str, chosen: Selection, corpus: Corpus, threads: int, python: Path | None) -> RetrievalArm:
    """Another package, in a process of its own that ends with the arm; it gets the vectors that our index has."""
    from ...retrieval.xtr import index

    if python is None:
        raise ConfigError(f"arm {name} needs --peers PYTHON, an interpreter of an environment that has it")
    folder = Path(tempfile.mkdtemp())
    projection = index.make_projection(corpus.tokens.vectors, index.TokenIndexLayout(), 0)
    for what, tokens in (("documents", corpus.tokens), ("queries", TokenEmbeddings.concatenate(corpus.query_tokens))):
        np.save(folder / f"{what}.npy", index.project(tokens.vectors, projection).astype(np.float16))
        np.save(folder / f"{what}-counts.npy", tokens.counts)
    log = folder / "log"
    process = subprocess.Popen(
        [python, baselines.__file__, chosen.name, folder, str(threads), json.dumps(dict(chosen.options))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        # Threads that wait must not take time from the arm that is measured.
        env={**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    )
    weakref.finalize(process, shutil.rmtree, folder, ignore_errors=True)

    def heard() -> dict[str, Any]:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            said = log.read_text().strip().splitlines() or ["it ended"]
            raise ConfigError(f"arm {name}: {said[-1]}")
        return json.loads(line)

    about = heard()

    def search(number: int) -> tuple[float, Sequence[int]]:
        assert process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        answer = heard()
        return answer["ms"], answer["documents"]

    return RetrievalArm(name, search, about["build_s"], about["bytes"])


def _bm25(corpus: Corpus) -> tuple[Search, int]:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    made = bm25s.BM25(k1=0.9, b=0.4)
    made.index(bm25s.tokenize(corpus.texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)

    def search(number: int) -> Sequence[int]:
        words = bm25s.tokenize([corpus.queries[number]], stopwords="en", stemmer=stemmer, show_progress=False)
        depth = min(DEPTH, len(corpus.ids))
        return made.retrieve(words, k=depth, show_progress=False, n_threads=1)[0][0].tolist()

    return search, sum(np.asarray(v).nbytes for v in made.scores.values())


def _faiss(corpus: Corpus) -> tuple[Search, int]:
    import faiss

    vectors = document_vectors(corpus.tokens)
    made = faiss.IndexFlatIP(vectors.shape[1])
    made.add(vectors)
    queries = [document_vectors(q) for q in corpus.query_tokens]
    return lambda number: made.search(queries[number], DEPTH)[1][0].tolist(), vectors.nbytes


def _sparse_encoder(corpus: Corpus) -> tuple[Search, int]:
    """The embedded masked language model as sentence-transformers has it, and its own search."""
    import torch
    from sentence_transformers import SparseEncoder, util
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    words = vdr.read_form(vdr.find_packaged_masked_lm(), embedded=True).lengths[1]
    model = SparseEncoder(
        modules=[MLMTransformer(str(vdr.find_packaged_masked_lm()), max_seq_length=words), SpladePooling("max")]
    )
    documents: Any = model.encode_document(corpus.texts, show_progress_bar=False)
    queries: Any = model.encode_query(corpus.queries, show_progress_bar=False)
    kept = documents.coalesce()

    def search(number: int) -> Sequence[int]:
        found = util.semantic_search(queries[number].unsqueeze(0), kept, top_k=DEPTH, score_function=util.dot_score)
        return [int(hit["corpus_id"]) for hit in found[0]]

    return search, kept.values().nbytes + kept.indices().to(torch.int32).nbytes


def _maxsim(corpus: Corpus) -> tuple[Search, int]:
    """Every token of every document, in whole precision."""
    vectors = corpus.tokens.vectors.astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(corpus.tokens.counts)[:-1]])

    def search(number: int) -> Sequence[int]:
        products = corpus.query_tokens[number].vectors.astype(np.float32) @ vectors.T
        return np.argsort(-np.maximum.reduceat(products, starts, axis=1).sum(0), kind="stable")[:DEPTH].tolist()

    return search, vectors.nbytes


def _index(name: str, chosen: Selection, corpus: Corpus) -> RetrievalArm:
    """An index of ours, in its store, opened as readers open it."""
    from ...retrieval.store import Change, Store
    from ...retrieval.store.documents import Document

    cls: Any = plugins().get("index", chosen.name, "arm")
    options, settings = _split(cls, chosen.options)
    if "@exact" in name:
        settings |= EXACT
    kind = cls(options)
    encoder = kind.load_encoder(str(chosen.options.get("encoder") or _usual(kind, corpus.encoder)))
    encoded = corpus.by(encoder)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "index", chosen.name, asdict(options), {"name": "", "fingerprint": ""})
        documents = [Document(i, t, {}) for i, t in zip(corpus.ids, corpus.texts, strict=True)]
        started = time.perf_counter()
        with PeakMemory() as peak:
            shared = kind.train(encoded, len(corpus.ids))
            rows, arrays = kind.segment(encoded, np.arange(len(corpus.ids)), shared)
            with store.writer() as writer:
                writer.commit(Change(documents, segments=[(len(corpus.ids), rows, arrays)], shared=shared))
        seconds = time.perf_counter() - started
        snapshot = store.snapshot
        store.close()
        size = sum(f.bytes for f in snapshot.manifest.files().values())
        # The files go with the folder; what is mapped stays.
        searcher = kind.searcher(snapshot.shared, [s.arrays for s in snapshot.segments], len(corpus.ids))
    chosen_settings = cls.Settings(**settings)
    queries = kind.queries(encoder, corpus.queries, chosen_settings)
    each = [queries[i] for i in range(len(corpus.queries))]
    again = _rescoring(encoder, corpus, each, kind.rescored(chosen_settings))

    def search(number: int) -> Sequence[int]:
        found = kind.search(searcher, each[number], DEPTH, chosen_settings, None)[0]
        return again(number, found).tolist()

    return RetrievalArm(name, _timed(search), seconds, size, rows / len(corpus.ids), peak.mib)


def _usual(kind: Any, tokens: str) -> str:
    """The encoder of an arm that names none: the one the collection was encoded with, where it is one of tokens."""
    if isinstance(getattr(kind, "members", None), dict):
        return ",".join(f"{m}={_usual(member, tokens)}" for m, member in kind.members.items())
    return tokens if kind.default_encoder == MINILM else kind.default_encoder


def _rescoring(encoder: Any, corpus: Corpus, queries: Sequence[Any], count: int) -> Callable[[int, Any], Any]:
    """What orders the best ``count`` anew by weights; those of documents are made before, as all encoding is."""
    if not count:
        return lambda number, found: found
    weighted = corpus.by(vdr.load_vocabulary_encoder(encoder.name, "auto", "float32", encoder.activation, encoder.top))

    def again(number: int, found: Any) -> Any:
        scores = weighted.take(found[:count]).dot(queries[number])
        return np.concatenate([found[:count][np.argsort(-scores, kind="stable")], found[count:]])

    return again


OTHERS: dict[str, tuple[str, Callable[[Corpus], tuple[Search, int]]]] = {
    "bm25s": ("bm25s", _bm25),
    "faiss_flat": ("faiss", _faiss),
    "maxsim": ("numpy", _maxsim),
    "sparse_encoder": ("sentence_transformers", _sparse_encoder),
}
