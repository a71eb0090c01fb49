"""Use an index: add, search with a filter, replace, delete, explain. Run: `python examples/index.py`."""

import tempfile
from pathlib import Path

from pilotfish.retrieval import Index

DOCUMENTS = [
    {"id": "shark", "text": "The whale shark is the largest fish in the sea.", "metadata": {"year": 2019}},
    {"id": "pilot", "text": "Pilot fish travel with sharks and eat their parasites.", "metadata": {"year": 2021}},
    {"id": "tax", "text": "Income tax returns are due in April.", "metadata": {"year": 2022}},
]


def main() -> None:
    """Run the example."""
    with tempfile.TemporaryDirectory() as folder, Index.create(Path(folder) / "index") as index:
        index.add(DOCUMENTS)
        for hit in index.search("who follows sharks?", k=2, where="year >= 2020"):
            print(f"{hit.score:.3f} {hit.id}: {hit.snippet}")
        index.upsert([{"id": "tax", "text": "Tax returns are due in May this year."}])
        index.delete(["shark"])
        for reason in index.explain("tax in May", "tax"):
            print(f"{reason.query:10} matches {reason.document or 'nothing'}, adds {reason.score:.3f}")


if __name__ == "__main__":
    main()
