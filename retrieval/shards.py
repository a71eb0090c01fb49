"""An index in shards: documents are partitioned, all shards are searched, and the answer is that of one index.

It is the same to the last bit. All shards have the centroids and codec of the first, and what is imputed for a query
token follows from the lists of all of them together, so a document's score does not depend on where it lies. Each shard
finds its best k, and the best k of those are the best of all; equal scores go by the order of shards, which is that
of documents.

A folder of shards holds ``shards.json`` and an index for each. Shards may be opened in this process, or on a Ray
cluster whose machines see the folder.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal import atomic_write

from .document_filter import Filter
from .errors import DamagedIndex, NoIndex, RetrievalError, first_line
from .index import Hit, Index
from .index_writer import Progress
from .registry import resolve_index_kind
from .store import Change, Store
from .store.documents import Document
from .store.manifest import SHARDS as NAME
from .validation import BATCH, as_document

FORMAT = 1


class Shard:
    """One shard, where it is opened."""

    def __init__(self, folder: str) -> None:
        self._index = Index.open(folder)

    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each list, [lists]; nothing of kinds that impute nothing."""
        tokens = getattr(self._index.searcher(), "tokens", None)
        return np.empty(0, np.int64) if tokens is None else np.array(tokens.sizes)

    def impute_by(self, sizes: NDArray[np.int64]) -> None:
        """Be told those of all shards together."""
        if len(sizes):
            self._index.searcher().tokens.impute_by(sizes)

    def count(self, where: Filter | None) -> int:
        """Documents that pass a filter."""
        return self._index.count(where)

    def search(self, query: Any, text: str, k: int, where: Filter | None, settings: Any) -> list[Hit]:
        """The best of this shard for an encoded query, by these settings and no wider ones."""
        return self._index.search_encoded(query, text, k, where, settings)

    def get(self, name: str) -> Document | None:
        """A document by its id."""
        return self._index.get(name)

    def stats(self) -> dict[str, Any]:
        """See `Index.stats`."""
        return self._index.stats()

    def wider(self, settings: Any) -> Any | None:
        """See `contracts.IndexKind.wider`."""
        return self._index.kind.wider(settings, self._index.searcher())


class Handle(Protocol):
    """How a shard is asked, wherever it is: ``ask("search", ...)`` begins, calling the answer ends."""

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Begin to call a method of the shard; call what is returned for the result."""
        ...


class LocalHandle:
    """A shard in this process, asked by a thread."""

    def __init__(self, folder: Path) -> None:
        self._shard, self._pool = Shard(str(folder)), ThreadPoolExecutor(1)

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """See `Handle`."""
        return self._pool.submit(getattr(self._shard, method), *arguments).result


class RayHandle:
    """A shard in an actor of a Ray cluster."""

    def __init__(self, folder: Path) -> None:
        import ray

        self._actor = ray.remote(Shard).remote(str(folder))

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """See `Handle`."""
        import ray

        answer = getattr(self._actor, method).remote(*arguments)
        return lambda: ray.get(answer)


class ShardedIndex:
    """Shards, searched as one index."""

    def __init__(self, folder: str | Path, ray_address: str | None = None) -> None:
        """Open all shards.

        Args:
            folder: That `build` made.
            ray_address: Of a cluster, ``auto`` for one that runs here; None for this process.

        Raises:
            RetrievalError: there is none, it is damaged, or Ray is not there.
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
        """Ask all shards at once."""
        waiting = [shard.ask(method, *arguments) for shard in self._shards]
        return [answer() for answer in waiting]

    def __len__(self) -> int:
        return sum(self._all("count", None))

    def search(self, query: str, k: int = 10, where: Filter | None = None, **settings: Any) -> list[Hit]:
        """As `Index.search`.

        Raises:
            RetrievalError: as there; and ``impute=kprime``, which no shard can tell alone.
        """
        chosen = self._first.settings(**settings)
        if getattr(chosen, "impute", "") == "kprime":
            raise RetrievalError("impute=kprime needs all tokens in one place; use warp with shards")
        if getattr(chosen, "rerank", 0):
            raise RetrievalError("rerank needs all documents in one place; leave it out with shards")
        encoded = self._first.kind.queries(self._first.encoder, [query], chosen)[0]
        possible = min(k, sum(self._all("count", where)))
        while True:
            found = [hit for part in self._all("search", encoded, query, k, where, chosen) for hit in part]
            found.sort(key=lambda hit: -hit.score)  # stable: shards come in the order of documents
            if len(found) >= possible or (more := self._shards[0].ask("wider", chosen)()) is None:
                return found[:k]
            chosen = more

    def get(self, name: str) -> Document | None:
        """A document by its id; None where there is none."""
        return next((d for d in self._all("get", name) if d is not None), None)

    def stats(self) -> dict[str, Any]:
        """What the shards hold together."""
        parts = self._all("stats")
        added = ("documents", "deleted", "segments", "postings", "bytes", "text_bytes")
        return {**parts[0], "shards": len(parts), **{name: sum(p[name] for p in parts) for name in added}}

    def close(self) -> None:
        """Let go of the files of the first shard; the others go with the process, or with the cluster."""
        self._first.close()

    def __enter__(self) -> "ShardedIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_sharded(folder: Path) -> bool:
    """Whether a folder has shards in it."""
    return (folder / NAME).exists()


def read_shards(folder: Path) -> list[str]:
    """Names of the shards in a folder.

    Raises:
        RetrievalError: there are none.
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
    """Join a Ray cluster.

    Raises:
        RetrievalError: Ray is not installed, or not there.
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
    """Make an index in ``count`` shards; each is encoded by itself, on a cluster all at once. Returns the documents.

    What all shards share is learned from the first documents, as with one index.

    Raises:
        RetrievalError: as `Index.create` and `Index.add`.
        OSError: it cannot be written.
    """
    if count < 1:
        raise RetrievalError(f"shards: expected 1 or more, got {count}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RetrievalError(f"{folder}: exists, and is not empty; shards are built into a folder of their own")
    every = _distinct(documents)
    if not resolve_index_kind(kind, options or {})[0].divisible:
        raise RetrievalError(f"{kind} cannot be in shards: what a document scores there depends on all others")
    with Index.create(folder / "shard-0", kind, encoder, options) as first:
        about = first.snapshot.manifest
        learned = first.kind.train(first.encoder.encode_documents([d.text for d in every[:BATCH]]), len(every))
    names = [f"shard-{i}" for i in range(count)]
    for i, name in enumerate(names):
        store = (
            Store(folder / name) if i == 0 else Store.create(folder / name, about.kind, about.options, about.encoder)
        )
        with store.writer() as writer:
            writer.commit(Change(shared=learned))
        store.close()
    bounds = np.linspace(0, len(every), count + 1).astype(int)
    parts = [[asdict(d) for d in every[b:e]] for b, e in itertools.pairwise(bounds)]
    places = [str((folder / name).absolute()) for name in names]
    told = progress or (lambda *_: None)
    done = 0
    for n in _filled(places, parts, ray_address):
        done += n
        told("indexing", done, len(every))
    atomic_write.write_bytes(folder / NAME, json.dumps({"format": FORMAT, "shards": names}).encode())
    return len(every)


def _distinct(documents: Iterable[Any]) -> list[Document]:
    """Checked documents.

    Raises:
        RetrievalError: one is wrong, two have one id, or there is none.
    """
    every = list(map(as_document, documents))
    if len({d.id for d in every}) < len(every):
        raise RetrievalError("two documents have the same id")
    if not every:
        raise RetrievalError("there are no documents")
    return every


def fill_shard(folder: str, documents: Sequence[Mapping[str, Any]]) -> int:
    """Put documents into a shard."""
    with Index.open(folder) as index:
        return index.add(documents, learn=False)


def _filled(places: list[str], parts: list[list[dict[str, Any]]], ray_address: str | None) -> Iterable[int]:
    if ray_address is None:
        return (fill_shard(place, part) for place, part in zip(places, parts, strict=True))
    connect_shards(ray_address)
    import ray

    task = ray.remote(fill_shard)
    waiting = [task.remote(place, part) for place, part in zip(places, parts, strict=True)]
    return (ray.get(answer) for answer in waiting)
