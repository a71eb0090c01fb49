"""What tests of RAG share: a server that answers by rule, and an index of a few documents."""

from collections.abc import Iterator
from pathlib import Path

import language_server
import pytest
import words

from pilotfish.retrieval import Index

DOCUMENTS = (
    ("sharks", "Pilot fish travel with sharks. They eat what sharks leave over.", {"year": 2020, "kind": "sea"}),
    ("bread", "Bread is baked from flour and water. An oven is hot.", {"year": 1999, "kind": "kitchen"}),
    ("moon", "The moon goes around the earth in a month. It has no air.", {"year": 2021, "kind": "sky"}),
)


@pytest.fixture(scope="session")
def language() -> Iterator[language_server.LanguageServer]:
    """A language model's server."""
    with language_server.running() as server:
        yield server


@pytest.fixture
def documents(tmp_path: Path) -> Iterator[Index]:
    """An index whose encoder is quick."""
    words.use()
    with Index.create(tmp_path / "documents", encoder="words", options={"dimension": 0}) as index:
        index.add([{"id": i, "text": t, "metadata": m} for i, t, m in DOCUMENTS])
        yield index
