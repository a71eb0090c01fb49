"""Test collections in BEIR format (documents, queries and qrels), and ranking metrics."""

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import RetrievalError, first_line

METRICS = ("ndcg@10", "recall@100", "mrr@10")
Rankings = Mapping[str, Mapping[str, float]]  # query id -> document id -> score


@dataclass(frozen=True)
class Collection:
    """BEIR folder: ``corpus.jsonl`` and ``queries.jsonl`` (each optionally with ``.gz``), and ``qrels/*.tsv``.

    Attributes:
        name: Name of the folder.
        corpus: Path of the documents.
        queries: Texts of the queries that have qrels, by query id.
        qrels: Query id -> document id -> relevance grade.
    """

    name: str
    corpus: Path
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_collection(folder: Path, split: str = "test") -> Collection:
    """Read a collection with the qrels of a split, or with its first qrels if there is no such split.

    Raises:
        RetrievalError: A file is missing or cannot be read.
    """
    if not folder.is_dir():
        raise RetrievalError(f"{folder}: no such folder")
    names = sorted((folder / "qrels").glob("*.tsv"))
    if not names:
        raise RetrievalError(f"{folder}: there are no qrels/*.tsv")
    qrels_file = next((n for n in names if n.stem == split), names[0])
    qrels: dict[str, dict[str, int]] = {}
    try:
        with qrels_file.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file, delimiter="\t"):
                if len(row) >= 3 and row[-1].lstrip("-").isdigit():  # skips the header
                    query, document = (row[0], row[1]) if len(row) == 3 else (row[0], row[2])
                    qrels.setdefault(query, {})[document] = int(row[-1])
        path = _either(folder, "queries.jsonl")
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
        queries = {str(q["_id"]): str(q["text"]) for q in lines if str(q["_id"]) in qrels}
    except (OSError, ValueError, KeyError, TypeError, csv.Error, EOFError) as error:
        raise RetrievalError(f"{folder}: {first_line(error)}") from None
    if not queries:
        raise RetrievalError(f"{folder}: no query of {qrels_file.name} is in queries.jsonl")
    return Collection(folder.absolute().name, _either(folder, "corpus.jsonl"), queries, qrels)


def _either(folder: Path, name: str) -> Path:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise RetrievalError(f"{folder}: there is no {name}")
    return path


def compute_metrics(qrels: Mapping[str, Mapping[str, int]], rankings: Rankings) -> dict[str, float]:
    """Compute `METRICS`, averaged over the queries that have qrels."""
    import ir_measures

    metric_names: dict[str, str] = dict(zip(("nDCG@10", "R@100", "RR@10"), METRICS, strict=True))
    measures = [ir_measures.parse_measure(name) for name in metric_names]
    run = {q: dict(r) for q, r in rankings.items()}
    values = ir_measures.calc_aggregate(measures, {q: dict(d) for q, d in qrels.items()}, run)
    return {metric_names[str(m)]: float(v) for m, v in values.items()}


def ranked_ids(ids: Sequence[str]) -> dict[str, float]:
    """Convert a ranking to scores for `compute_metrics`.

    The scores follow from the ranks, because ir_measures would break ties by document id.
    """
    return {name: float(len(ids) - place) for place, name in enumerate(ids)}
