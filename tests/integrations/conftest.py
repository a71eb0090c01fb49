"""What tests of RAG share: a server that answers by rule, and an index of a few documents."""

from collections.abc import Iterator
from pathlib import Path

import language_server
import pytest
import words
from language_server import DOCUMENTS

from pilotfish.retrieval import Index


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
