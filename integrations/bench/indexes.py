"""Indexes of `pilotfish bench retrieval`: those of Pilotfish, and baselines."""

import inspect
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

from ...plugins.config import ConfigError, Selection, build_options, parse_assignments, unknown_key_message
from ...plugins.dense import document_vectors
from ...plugins.manager import plugins
from ...retrieval.encoders import MINILM, vdr
from ...retrieval.sparse_vectors import SparseVectors
from ...retrieval.token_embeddings import TokenEmbeddings
from . import baselines
from .corpus import Corpus
from .memory import PeakMemory

DEPTH = 100
EXACT = {"nprobe": 1 << 20, "impute": "kprime", "kprime": 1000}
Search = Callable[[int], Sequence[int]]  # index of a query -> internal document ids, best first
Timed = Callable[[int], tuple[float, Sequence[int]]]  # the same, with milliseconds


@dataclass(frozen=True)
class RetrievalArm:
    """Index that is measured, with its search function."""

    name: str
    search: Timed
    build_seconds: float
    bytes: int
    postings: float = 0  # per document
    peak_mib: float | None = None  # while building; None if built in another process


def _timed(search: Search) -> Timed:
    def timed(number: int) -> tuple[float, Sequence[int]]:
        started = time.perf_counter()
        results = search(number)
        return 1e3 * (time.perf_counter() - started), results

    return timed


def parse_arm(arm: str) -> Selection:
    """Parse the name and options of an arm.

    Raises:
        ConfigError: There is no such arm, or it has no such option.
    """
    selected = parse_assignments(arm.replace("@exact", "").replace("@", ","))
    if "@exact" in arm and selected.name != "xtr":
        raise ConfigError(f"arm {arm}: only xtr has @exact")
    if selected.name in OTHERS:
        known = tuple(inspect.signature(OTHERS[selected.name][1]).parameters)[1:]
        if unknown := set(selected.options) - set(known):
            raise ConfigError(unknown_key_message(f"arm {arm}", sorted(unknown)[0], known))
    elif selected.name not in baselines.NAMES:
        cls: Any = plugins().get("index", selected.name, "arm")
        _split(cls, selected.options)
    return selected


def _split(cls: Any, options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the options for building an index, and the settings for searching it."""
    making = {k: v for k, v in options.items() if k in cls.Options.__dataclass_fields__}
    searching = {k: v for k, v in options.items() if k not in making and k != "encoder"}
    return build_options(cls.Options, making, cls.name), asdict(build_options(cls.Settings, searching, cls.name))


def make_arm(name: str, corpus: Corpus, threads: int, python: Path | None) -> RetrievalArm:
    """Build an arm over a collection; ``python`` is the interpreter with the packages in `baselines`.

    Raises:
        ConfigError: A package that the arm needs is not installed.
    """
    selected = parse_arm(name)
    started = time.perf_counter()
    if selected.name in OTHERS:
        package, other = OTHERS[selected.name]
        if find_spec(package) is None:
            raise ConfigError(f"arm {selected.name} needs {package}; pip install pilotfish[bench]")
        with PeakMemory() as peak:
            search, size = other(corpus, **selected.options)
    elif selected.name in baselines.NAMES:
        return _run_baseline(name, selected, corpus, threads, python)
    else:
        return _index(name, selected, corpus)
    return RetrievalArm(name, _timed(search), time.perf_counter() - started, size, peak_mib=peak.mib)


def _run_baseline(name: str, chosen: Selection, corpus: Corpus, threads: int, python: Path | None) -> RetrievalArm:
    """Search another package's index, in a process that all arms with the same index share."""
    if python is None:
        raise ConfigError(f"arm {name} needs --peers PYTHON, an interpreter of an environment that has it")
    building = {k: v for k, v in chosen.options.items() if k in baselines.BUILD_OPTIONS[chosen.name]}
    searching = {k: v for k, v in chosen.options.items() if k not in building}
    key = chosen.name, json.dumps(building), threads
    if key not in corpus.indexes:
        process = _BaselineProcess(name, chosen.name, building, corpus, threads, python)
        corpus.indexes[key] = process, process.answer()
    process, about = corpus.indexes[key]

    def search(number: int) -> tuple[float, Sequence[int]]:
        answer = process.ask(number, searching)
        return answer["ms"], answer["documents"]

    return RetrievalArm(name, search, about["build_s"], about["bytes"])


class _BaselineProcess:
    """A process with the index of another package; it gets the vectors of the Pilotfish index, and ends with this."""

    def __init__(
        self, arm: str, name: str, building: dict[str, Any], corpus: Corpus, threads: int, python: Path
    ) -> None:
        folder = Path(tempfile.mkdtemp())
        (_write_sparse_vectors if name in baselines.SPARSE else _write_token_vectors)(folder, corpus)
        self._arm, self._log = arm, folder / "log"
        self._process = subprocess.Popen(
            [python, baselines.__file__, name, folder, str(threads), json.dumps(building)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            # Waiting threads must not take CPU time from the arm that is measured.
            env={**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
        )
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def ask(self, number: int, searching: dict[str, Any]) -> dict[str, Any]:
        """Search for a query with some options."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, searching]) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Read the next answer."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            lines = self._log.read_text().strip().splitlines() or ["the process ended"]
            raise ConfigError(f"arm {self._arm}: {lines[-1]}")
        return json.loads(line)


def _write_token_vectors(folder: Path, corpus: Corpus) -> None:
    """Write the token embeddings of documents and queries, with the projection of the XTR index."""
    from ...retrieval.xtr import index

    projection = index.make_projection(corpus.tokens.vectors, index.TokenIndexLayout(), 0)
    for what, tokens in (("documents", corpus.tokens), ("queries", TokenEmbeddings.concatenate(corpus.query_tokens))):
        np.save(folder / f"{what}.npy", index.project(tokens.vectors, projection).astype(np.float16))
        np.save(folder / f"{what}-counts.npy", tokens.counts)


def _write_sparse_vectors(folder: Path, corpus: Corpus) -> None:
    """Write the term weights of documents and queries, encoded with the default options of `vdr`."""
    cls: Any = plugins().get("index", "vdr", "arm")
    kind = cls(cls.Options())
    encoder = kind.load_encoder(kind.default_encoder)
    queries = kind.queries(encoder, corpus.queries, cls.Settings())
    of_queries = [queries[i] for i in range(len(corpus.queries))]
    for what, vectors in (("documents", corpus.by(encoder)), ("queries", SparseVectors.concatenate(of_queries))):
        arrays = {"indices": vectors.indices, "values": vectors.values, "counts": vectors.counts}
        np.savez(folder / f"{what}.npz", **arrays)


def _bm25(corpus: Corpus, backend: str = "numpy") -> tuple[Search, int]:
    """Index with bm25s; queries are tokenized beforehand, as those of `bm25` are."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    options: dict[str, Any] = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    index = bm25s.BM25(k1=0.9, b=0.4, backend=backend)
    index.index(bm25s.tokenize(corpus.texts, **options), show_progress=False)
    queries = [bm25s.tokenize([query], **options) for query in corpus.queries]
    depth = min(DEPTH, len(corpus.ids))

    def search(number: int) -> Sequence[int]:
        return index.retrieve(queries[number], k=depth, show_progress=False, n_threads=0)[0][0].tolist()

    if corpus.queries:
        search(0)  # numba compiles
    return search, sum(np.asarray(v).nbytes for v in index.scores.values())


def _faiss(corpus: Corpus) -> tuple[Search, int]:
    import faiss

    vectors = document_vectors(corpus.tokens)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    queries = [document_vectors(q) for q in corpus.query_tokens]
    return lambda number: index.search(queries[number], DEPTH)[1][0].tolist(), vectors.nbytes


def _sparse_encoder(corpus: Corpus) -> tuple[Search, int]:
    """Run the embedded masked language model in sentence-transformers, with that package's search."""
    import torch
    from sentence_transformers import SparseEncoder, util
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    max_length = vdr.read_form(vdr.find_packaged_masked_lm(), embedded=True).lengths[1]
    model = SparseEncoder(
        modules=[MLMTransformer(str(vdr.find_packaged_masked_lm()), max_seq_length=max_length), SpladePooling("max")]
    )
    documents: Any = model.encode_document(corpus.texts, show_progress_bar=False)
    queries: Any = model.encode_query(corpus.queries, show_progress_bar=False)
    matrix = documents.coalesce()

    def search(number: int) -> Sequence[int]:
        hits = util.semantic_search(queries[number].unsqueeze(0), matrix, top_k=DEPTH, score_function=util.dot_score)
        return [int(hit["corpus_id"]) for hit in hits[0]]

    return search, matrix.values().nbytes + matrix.indices().to(torch.int32).nbytes


def _maxsim(corpus: Corpus) -> tuple[Search, int]:
    """Score every token of every document exactly, in float32 (MaxSim)."""
    vectors = corpus.tokens.vectors.astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(corpus.tokens.counts)[:-1]])

    def search(number: int) -> Sequence[int]:
        products = corpus.query_tokens[number].vectors.astype(np.float32) @ vectors.T
        return np.argsort(-np.maximum.reduceat(products, starts, axis=1).sum(0), kind="stable")[:DEPTH].tolist()

    return search, vectors.nbytes


def _index(name: str, chosen: Selection, corpus: Corpus) -> RetrievalArm:
    """Search an index of Pilotfish, which all arms with the same build options share."""
    cls: Any = plugins().get("index", chosen.name, "arm")
    options, settings = _split(cls, chosen.options)
    if "@exact" in name:
        settings |= EXACT
    kind = cls(options)
    named = str(chosen.options.get("encoder") or _usual(kind, corpus.encoder))
    encoder = kind.load_encoder(named)
    encoded = corpus.by(encoder)
    key = chosen.name, json.dumps(asdict(options), default=str), named
    if key not in corpus.indexes:
        corpus.indexes[key] = _build(chosen.name, kind, options, encoded, corpus)
    searcher, rows, seconds, size, peak_mib = corpus.indexes[key]
    chosen_settings = cls.Settings(**settings)
    queries = kind.queries(encoder, corpus.queries, chosen_settings)
    each = [queries[i] for i in range(len(corpus.queries))]
    rerank = _rescoring(encoder, corpus, each, kind.rescored(chosen_settings))

    def search(number: int) -> Sequence[int]:
        results = kind.search(searcher, each[number], DEPTH, chosen_settings, None)[0]
        return rerank(number, results).tolist()

    return RetrievalArm(name, _timed(search), seconds, size, rows / len(corpus.ids), peak_mib)


def _build(name: str, kind: Any, options: Any, encoded: Any, corpus: Corpus) -> tuple[Any, int, float, int, float]:
    """Build an index in a store, and open it as readers do.

    Returns:
        The searcher, the number of rows, the seconds it took, the bytes of the files, and the peak memory in MiB.
    """
    from ...retrieval.store import Change, Store
    from ...retrieval.store.documents import Document

    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "index", name, asdict(options), {"name": "", "fingerprint": ""})
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
        # The files are deleted with the folder; their mappings stay valid.
        searcher = kind.searcher(snapshot.shared, [s.arrays for s in snapshot.segments], len(corpus.ids))
    return searcher, rows, seconds, size, peak.mib


def _usual(kind: Any, tokens: str) -> str:
    """Return the default encoder of an arm: for multi-vector indexes, the one that encoded the collection."""
    if isinstance(getattr(kind, "members", None), dict):
        return ",".join(f"{m}={_usual(member, tokens)}" for m, member in kind.members.items())
    return tokens if kind.default_encoder == MINILM else kind.default_encoder


def _rescoring(encoder: Any, corpus: Corpus, queries: Sequence[Any], count: int) -> Callable[[int, Any], Any]:
    """Return a function that re-ranks the best ``count`` by term weights; documents are encoded beforehand."""
    if not count:
        return lambda number, results: results
    weighted = corpus.by(vdr.load_vocabulary_encoder(encoder.name, "auto", "float32", encoder.activation, encoder.top))

    def rerank(number: int, results: Any) -> Any:
        scores = weighted.take(results[:count]).dot(queries[number])
        return np.concatenate([results[:count][np.argsort(-scores, kind="stable")], results[count:]])

    return rerank


OTHERS: dict[str, tuple[str, Callable[..., tuple[Search, int]]]] = {
    "bm25s": ("bm25s", _bm25),
    "faiss_flat": ("faiss", _faiss),
    "maxsim": ("numpy", _maxsim),
    "sparse_encoder": ("sentence_transformers", _sparse_encoder),
}
