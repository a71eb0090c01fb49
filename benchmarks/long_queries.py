#!/usr/bin/env python3
"""Make a collection with long queries: sentences of a collection's documents, each with its document as the answer.

usage: python benchmarks/long_queries.py COLLECTION OUT [COUNT]

COLLECTION is a folder in BEIR's format. A query is one sentence of at least 30 words, the middle one of those of a
document, from COUNT documents (default 200) drawn with a fixed seed. The documents stay as they are, so each sentence
is part of its document.
"""

import json
import random
import re
import shutil
import sys
from pathlib import Path

from pilotfish.retrieval import evaluation
from pilotfish.retrieval.loaders import DocumentSource

SEED, WORDS = 0, 30


def main() -> None:
    """Write the collection named on the command line."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 200
    collection = evaluation.read_collection(source)
    documents = list(DocumentSource([collection.corpus], lambda text: [text]))
    random.Random(SEED).shuffle(documents)
    queries: dict[str, str] = {}
    for document in documents:
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", document.text) if len(s.split()) >= WORDS]
        if sentences and len(queries) < count:
            queries[document.id] = sentences[len(sentences) // 2]
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    shutil.copy(collection.corpus, out / collection.corpus.name)
    lines = [json.dumps({"_id": f"q{i}", "text": text}) for i, text in enumerate(queries.values())]
    (out / "queries.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"q{i}\t{document}\t1" for i, document in enumerate(queries)]
    (out / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
