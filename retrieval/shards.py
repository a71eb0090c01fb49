"""Sharded index: the documents are partitioned, all shards are searched, and their results are merged.

The result is bit-identical to that of one index. All shards have the centroids and the codec of the first one, and the
imputed similarities follow from the list sizes of all shards together, so the score of a document does not depend on
its shard. The best k documents of all shards are among the best k of each; ties are in the order of shards, which is
that of documents.

The folder of a sharded index contains ``shards.json`` and one index per shard. Shards can be opened in this process, or
on a Ray cluster whose machines can access the folder.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal import atomic_write

from .document_filter import Filter
from .errors import DamagedIndex, NoIndex, RetrievalError, first_line
from .index import Hit, Index
from .index_writer import Progress
from .registry import resolve_encoder, resolve_index_kind
from .store import Change, Store
from .store.documents import Document
from .store.manifest import SHARDS as NAME
from .validation import BATCH, as_document

FORMAT = 1


class Shard:
    """Open shard, in the process or actor that searches it."""

    def __init__(self, folder: str) -> None:
        self._index = Index.open(folder)

    def sizes(self) -> NDArray[np.int64]:
        """Return the number of tokens of each inverted list, [lists]; empty if the index type does not impute."""
        tokens = getattr(self._index.searcher(), "tokens", None)
        return np.empty(0, np.int64) if tokens is None else np.array(tokens.sizes)

    def impute_by(self, sizes: NDArray[np.int64]) -> None:
        """Set the list sizes of all shards together, from which similarities are imputed, [lists]."""
        if len(sizes):
            self._index.searcher().tokens.impute_by(sizes)

    def count(self, where: Filter | None) -> int:
        """Return the number of documents that pass a filter."""
        return self._index.count(where)

    def search(self, query: Any, text: str, k: int, where: Filter | None, settings: Any) -> list[Hit]:
        """Return the best documents of this shard for an encoded query, without widening the search."""
        return self._index.search_encoded(query, text, k, where, settings)

    def get(self, name: str) -> Document | None:
        """Return the document with an id, or None."""
        return self._index.get(name)

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the shard; see `Index.stats`."""
        return self._index.stats()

    def wider(self, settings: Any) -> Any | None:
        """Return settings of a wider search, or None; see `contracts.IndexKind.wider`."""
        return self._index.kind.wider(settings, self._index.searcher())


class Handle(Protocol):
    """Handle of a local or remote shard, whose methods are called asynchronously."""

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Start a call of a method of the shard; return a function that waits for the result."""
        ...


class LocalHandle:
    """Handle of a shard in this process, with one thread."""

    def __init__(self, folder: Path) -> None:
        self._shard, self._pool = Shard(str(folder)), ThreadPoolExecutor(1)

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Start a call; see `Handle`."""
        return self._pool.submit(getattr(self._shard, method), *arguments).result


class RayHandle:
    """Handle of a shard in an actor of a Ray cluster."""

    def __init__(self, folder: Path) -> None:
        import ray

        self._actor = ray.remote(Shard).remote(str(folder))

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Start a call; see `Handle`."""
        import ray

        answer = getattr(self._actor, method).remote(*arguments)
        return lambda: ray.get(answer)


class ShardedIndex:
    """Index over all shards of a folder."""

    def __init__(self, folder: str | Path, ray_address: str | None = None) -> None:
        """Open all shards.

        Args:
            folder: Folder that `build_shards` wrote.
            ray_address: Address of a Ray cluster, ``auto`` for a running one, ``local`` for a new one on this machine;
                None to open the shards in this process.

        Raises:
            RetrievalError: The folder contains no shards, a shard is damaged, or Ray cannot be reached.
        """
        self.folder = Path(folder)
        names = read_shards(self.folder)
        if ray_address is not None:
            connect_shards(ray_address)
        make: Any = LocalHandle if ray_address is None else RayHandle
        self._first = Index.open(self.folder / names[0])
        self._shards: list[Handle] = [make(self.folder.absolute() / name) for name in names]
        total = np.sum(self._all("sizes"), axis=0)
        self._all("impute_by", total)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all shards concurrently, and return the results in the order of shards."""
        waiting = [shard.ask(method, *arguments) for shard in self._shards]
        return [answer() for answer in waiting]

    def __len__(self) -> int:
        return sum(self._all("count", None))

    def search(self, query: str, k: int = 10, where: Filter | None = None, **settings: Any) -> list[Hit]:
        """Return the best documents for a query; see `Index.search`.

        Raises:
            RetrievalError: The filter or a setting is invalid, or a setting needs all documents in one index:
                ``impute=kprime`` or ``rerank``.
        """
        search_settings = self._first.settings(**settings)
        if getattr(search_settings, "impute", "") == "kprime":
            raise RetrievalError("impute=kprime needs all tokens in one place; use warp with shards")
        if getattr(search_settings, "rerank", 0):
            raise RetrievalError("rerank needs all documents in one place; use rerank=0 with shards")
        encoded = self._first.kind.queries(self._first.encoder, [query], search_settings)[0]
        possible = min(k, sum(self._all("count", where)))
        while True:
            hits = [hit for part in self._all("search", encoded, query, k, where, search_settings) for hit in part]
            hits.sort(key=lambda hit: -hit.score)  # stable, because shards are in the order of documents
            if len(hits) >= possible or (more := self._shards[0].ask("wider", search_settings)()) is None:
                return hits[:k]
            search_settings = more

    def get(self, name: str) -> Document | None:
        """Return the document with an id, or None if there is none."""
        return next((d for d in self._all("get", name) if d is not None), None)

    def stats(self) -> dict[str, Any]:
        """Return the statistics of all shards together."""
        parts = self._all("stats")
        added = ("documents", "deleted", "segments", "postings", "bytes", "text_bytes")
        return {**parts[0], "shards": len(parts), **{name: sum(p[name] for p in parts) for name in added}}

    def close(self) -> None:
        """Close the first shard; the other shards are closed with the process or the cluster."""
        self._first.close()

    def __enter__(self) -> "ShardedIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_sharded(folder: Path) -> bool:
    """Return whether a folder contains a sharded index."""
    return (folder / NAME).exists()


def read_shards(folder: Path) -> list[str]:
    """Return the names of the shards in a folder.

    Raises:
        NoIndex: The folder contains no shards.
        DamagedIndex: ``shards.json`` cannot be read.
    """
    try:
        about = json.loads((folder / NAME).read_text(encoding="utf-8"))
        names = [str(name) for name in about["shards"]]
        if about["format"] != FORMAT or not names:
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise NoIndex(f"{folder}: there are no shards; make them with `pilotfish index build --shards N`") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedIndex(f"{folder}: {NAME} is damaged") from None
    return names


def connect_shards(address: str) -> None:
    """Connect to a Ray cluster.

    Raises:
        RetrievalError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise RetrievalError("shards on a cluster need Ray; pip install pilotfish[ray]") from None
    if not ray.is_initialized():
        try:
            ray.init(address=None if address == "local" else address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RetrievalError(f"Ray at {address}: {first_line(error)}") from None


# ------------------------------------------------------------------------------------------------------------ building


def build_shards(
    folder: Path,
    documents: Iterable[Any],
    count: int,
    kind: str = "xtr",
    encoder: str | None = None,
    options: Mapping[str, Any] | None = None,
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Build an index in ``count`` shards and return the number of documents.

    Shards are filled one after the other, or concurrently on a Ray cluster. The shared arrays are trained on the first
    documents, as in a single index.

    Raises:
        RetrievalError: `Index.create` or `Index.add` fails, ids are not unique, or the index type cannot be sharded.
        OSError: The folder cannot be written.
    """
    if count < 1:
        raise RetrievalError(f"shards: expected 1 or more, got {count}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RetrievalError(f"{folder}: exists, and is not empty; build shards into a new folder")
    all_documents = _distinct(documents)
    if not resolve_index_kind(kind, options or {})[0].divisible:
        raise RetrievalError(f"{kind} cannot be in shards: a document's score depends on all other documents")
    with Index.create(folder / "shard-0", kind, encoder, options) as first:
        about = first.snapshot.manifest
        shared = first.kind.train(
            first.encoder.encode_documents([d.text for d in all_documents[:BATCH]]), len(all_documents)
        )
    names = [f"shard-{i}" for i in range(count)]
    for i, name in enumerate(names):
        store = (
            Store(folder / name) if i == 0 else Store.create(folder / name, about.kind, about.options, about.encoder)
        )
        with store.writer() as writer:
            writer.commit(Change(shared=shared))
        store.close()
    bounds = np.linspace(0, len(all_documents), count + 1).astype(int)
    parts = [all_documents[b:e] for b, e in itertools.pairwise(bounds)]
    folders = [str((folder / name).absolute()) for name in names]
    on_progress = progress or (lambda *_: None)
    done = 0
    for n in _filled(folders, parts, ray_address):
        done += n
        on_progress("indexing", done, len(all_documents))
    atomic_write.write_bytes(folder / NAME, json.dumps({"format": FORMAT, "shards": names}).encode())
    return len(all_documents)


def shard_encoder(kind: str, encoder: str | None, options: Mapping[str, Any]) -> Any:
    """Load the encoder of a build of shards, which splits texts into chunks.

    Raises:
        RetrievalError: The index type, an option or the encoder is invalid.
    """
    index_kind, _ = resolve_index_kind(kind, options)
    return resolve_encoder(index_kind, encoder or index_kind.default_encoder, "auto", "float32")


def _distinct(documents: Iterable[Any]) -> list[Document]:
    """Validate documents and check that their ids are unique.

    Raises:
        RetrievalError: A document is invalid, two documents have the same id, or there are no documents.
    """
    all_documents = list(map(as_document, documents))
    if len({d.id for d in all_documents}) < len(all_documents):
        raise RetrievalError("two documents have the same id")
    if not all_documents:
        raise RetrievalError("there are no documents")
    return all_documents


def fill_shard(folder: str, documents: Sequence[Document]) -> int:
    """Add documents to a shard, without retraining, and return how many were added."""
    with Index.open(folder) as index:
        return index.add(documents, learn=False)


def _filled(places: list[str], parts: list[list[Document]], ray_address: str | None) -> Iterable[int]:
    if ray_address is None:
        return (fill_shard(folder, part) for folder, part in zip(places, parts, strict=True))
    connect_shards(ray_address)
    import ray

    task = ray.remote(fill_shard)
    waiting = [task.remote(folder, part) for folder, part in zip(places, parts, strict=True)]
    return (ray.get(answer) for answer in waiting)
