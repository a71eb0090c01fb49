"""Collections with judged queries, in BEIR's form, and how well a ranking does on them."""

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import RetrievalError, first_line

METRICS = ("ndcg@10", "recall@100", "mrr@10")
Rankings = Mapping[str, Mapping[str, float]]  # query -> document -> score


@dataclass(frozen=True)
class Collection:
    """A BEIR folder: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/*.tsv``, the first two perhaps with ``.gz``.

    Attributes:
        name: Of the folder.
        corpus: Path of its documents.
        queries: Text by id, of those that were judged.
        judged: query -> document -> grade.
    """

    name: str
    corpus: Path
    queries: dict[str, str]
    judged: dict[str, dict[str, int]]


def read_collection(folder: Path, split: str = "test") -> Collection:
    """Open a collection; of several ``qrels/*.tsv`` that of a split, or, where that is not there, the first.

    Raises:
        RetrievalError: a file is missing or cannot be read.
    """
    if not folder.is_dir():
        raise RetrievalError(f"{folder}: no such folder")
    names = sorted((folder / "qrels").glob("*.tsv"))
    if not names:
        raise RetrievalError(f"{folder}: there are no qrels/*.tsv")
    chosen = next((n for n in names if n.stem == split), names[0])
    judged: dict[str, dict[str, int]] = {}
    try:
        with chosen.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file, delimiter="\t"):
                if len(row) >= 3 and row[-1].lstrip("-").isdigit():  # else the head
                    query, document = (row[0], row[1]) if len(row) == 3 else (row[0], row[2])
                    judged.setdefault(query, {})[document] = int(row[-1])
        path = _either(folder, "queries.jsonl")
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
        queries = {str(q["_id"]): str(q["text"]) for q in lines if str(q["_id"]) in judged}
    except (OSError, ValueError, KeyError, TypeError, csv.Error, EOFError) as error:
        raise RetrievalError(f"{folder}: {first_line(error)}") from None
    if not queries:
        raise RetrievalError(f"{folder}: no query of {chosen.name} stands in queries.jsonl")
    return Collection(folder.absolute().name, _either(folder, "corpus.jsonl"), queries, judged)


def _either(folder: Path, name: str) -> Path:
    found = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if found is None:
        raise RetrievalError(f"{folder}: there is no {name}")
    return found


def compute_metrics(judged: Mapping[str, Mapping[str, int]], rankings: Rankings) -> dict[str, float]:
    """`METRICS`, means over the queries that were judged."""
    import ir_measures

    wanted: dict[str, str] = dict(zip(("nDCG@10", "R@100", "RR@10"), METRICS, strict=True))
    measures = [ir_measures.parse_measure(name) for name in wanted]
    run = {q: dict(r) for q, r in rankings.items()}
    found = ir_measures.calc_aggregate(measures, {q: dict(d) for q, d in judged.items()}, run)
    return {wanted[str(m)]: float(v) for m, v in found.items()}


def ranked_ids(ids: Sequence[str]) -> dict[str, float]:
    """A ranking as `measure` wants it: equal scores would be broken by names, so places count, not scores."""
    return {name: float(len(ids) - place) for place, name in enumerate(ids)}
