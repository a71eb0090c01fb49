"""Collections with qrels, encoded once for all indexes that are compared."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from ...retrieval.encoders.multi_encoder import MultiEncoded, MultiEncoder
from ...retrieval.evaluation import Collection
from ...retrieval.loaders import DocumentSource
from ...retrieval.token_embeddings import TokenEmbeddings


@dataclass(frozen=True)
class Corpus:
    """Collection with its encoded documents and queries."""

    name: str
    ids: list[str]
    texts: list[str]
    asked: list[str]  # ids of the queries
    queries: list[str]
    qrels: dict[str, dict[str, int]]  # qrels
    tokens: TokenEmbeddings
    query_tokens: list[TokenEmbeddings]
    seconds: dict[str, float]
    encoder: str  # name of the encoder of ``tokens``
    parts: "tuple[Corpus, ...]" = ()  # collections of a union
    made: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # id of an encoder -> encoder, encoded documents
    indexes: dict[Any, Any] = field(default_factory=dict)  # name and build options -> index that several arms share

    def by(self, encoder: Any) -> Any:
        """Return all documents as encoded by an encoder; they are encoded once for all arms."""
        if isinstance(encoder, MultiEncoder):
            return MultiEncoded({name: self.by(part) for name, part in encoder.encoders.items()})
        if id(encoder) not in self.made:
            if self.parts:
                pieces = [p.by(encoder) for p in self.parts]
                encoded = type(pieces[0]).concatenate(pieces)
            else:
                encoded = encoder.encode_documents(self.texts)
            self.made[id(encoder)] = encoder, encoded
        return self.made[id(encoder)][1]


def encode_collection(collection: Collection, encoder_name: str | None, at_most: int) -> Corpus:
    """Encode the documents and at most ``at_most`` queries of a collection."""
    from ...retrieval.encoders import MINILM, load_multi_vector_encoder

    encoder = load_multi_vector_encoder(
        encoder_name or MINILM, "auto", "float32"
    )  # loaded as index kinds load it, so that it is the same object
    documents = list(DocumentSource([collection.corpus], lambda text: [text]))
    asked = list(collection.queries)[:at_most]
    queries = [collection.queries[q] for q in asked]
    started = time.perf_counter()
    tokens = encoder.encode_documents([d.text for d in documents])
    encoding = time.perf_counter() - started
    each = []
    for query in queries:
        started = time.perf_counter()
        encoder.encode_queries([query])
        each.append(1e3 * (time.perf_counter() - started))
    query_tokens = [encoder.encode_queries([q]) for q in queries]
    return Corpus(
        collection.name,
        [d.id for d in documents],
        [d.text for d in documents],
        asked,
        queries,
        collection.qrels,
        tokens,
        query_tokens,
        {"encode_s": encoding, "encode_query_ms": statistics.median(each)},
        encoder_name or MINILM,
        made={id(encoder): (encoder, tokens)},
    )


def union_of_collections(parts: list[Corpus]) -> Corpus:
    """Merge collections into one, with the queries and qrels of each."""
    return Corpus(
        "union",
        [f"{p.name}:{i}" for p in parts for i in p.ids],
        [t for p in parts for t in p.texts],
        [f"{p.name}:{q}" for p in parts for q in p.asked],
        [q for p in parts for q in p.queries],
        {f"{p.name}:{q}": {f"{p.name}:{d}": g for d, g in j.items()} for p in parts for q, j in p.qrels.items()},
        TokenEmbeddings.concatenate([p.tokens for p in parts]),
        [t for p in parts for t in p.query_tokens],
        {"encode_s": sum(p.seconds["encode_s"] for p in parts)},
        parts[0].encoder,
        tuple(parts),
    )
