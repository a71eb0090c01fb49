"""Benchmark of look-ups in a datastore: `python benchmarks/datastore_lookups.py FOLDER...`, folders of real texts.

Paragraphs are sampled from the texts, with replacement, until they have the requested number of tokens. Queries are
positions in the same texts; all tokens but the latest few are changed, so that matches have various lengths.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS

from pilotfish.integrations.bench import record
from pilotfish.integrations.bench.record import Record
from pilotfish.integrations.vllm.bench import corpora
from pilotfish.integrations.vllm.cli.datastore import encode_texts, find
from pilotfish.integrations.vllm.models import embedded, registry
from pilotfish.plugins.drafting.datastore import Datastore, build_datastore
from pilotfish.plugins.drafting.history import TokenHistory

LOOKUPS = 20_000
WIDTH, MOST = 24, 32  # length and number of continuations, as in RASD


def main() -> None:
    """Run the benchmark and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    arguments = parser.parse_args()
    tokenizer = corpora.tokenizer_of(registry.resolve_model(embedded.SMOLLM2.name))
    rng = random.Random(0)
    paragraphs = [
        ids
        for path in find(arguments.folders, (".txt",))
        for part in path.read_text(encoding="utf-8").split("\n\n")
        if len(ids := encode_texts(tokenizer, part)) > 20
    ]
    samples: list[list[int]] = []
    count = 0
    while count < arguments.tokens:
        samples.append(rng.choice(paragraphs))
        count += len(samples[-1]) + 1
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        about = build_datastore(Path(folder) / "store", samples, "smollm2", "0", arguments.tokens)
        built = time.perf_counter() - started
        store = Datastore(Path(folder) / "store")
        rows = [Record("datastore", f"tokens_{about.tokens}", "datastore", "build_s", round(built, 2), "s")]
        rows += timed("datastore", about.tokens, paragraphs, lambda tail: lookup(store, tail))
        history = TokenHistory(1 << 20)
        for ids in samples[: (1 << 20) // 100]:
            history.append(np.array(ids, np.int32), ends=True)
        rows += timed(
            "history", len(history), paragraphs, lambda tail: history.find_longest_suffix(tail, WIDTH, MOST, WIDTH, 2)
        )
    record.write_records(RESULTS / "datastore.json", rows)


def lookup(store: Datastore, tail: np.ndarray) -> None:
    """Look up a text as RASD does."""
    store.continuations(store.find_longest_suffix(tail), WIDTH, MOST)


def timed(arm: str, tokens: int, paragraphs: list[list[int]], look_up: object) -> list[Record]:
    """Return the median and the 99th percentile of look-up times, in microseconds."""
    rng, taken = random.Random(1), []
    for i in range(LOOKUPS + 100):
        ids = rng.choice(paragraphs)
        end = rng.randrange(8, len(ids))
        tail = np.array(ids[max(0, end - 40) : end], np.int32)
        tail[: -rng.randrange(1, 8)] += 1  # leaves 1 to 7 latest tokens unchanged
        started = time.perf_counter()
        look_up(tail)  # type: ignore[operator]
        if i >= 100:
            taken.append(1e6 * (time.perf_counter() - started))
    name = f"tokens_{tokens}"
    return [
        Record("datastore", name, arm, "lookup_us_median", round(statistics.median(taken), 1), "us"),
        Record("datastore", name, arm, "lookup_us_p99", round(statistics.quantiles(taken, n=100)[-1], 1), "us"),
    ]


if __name__ == "__main__":
    main()
