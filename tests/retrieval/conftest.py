"""What tests of indexes share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import words

from pilotfish.retrieval import Index


@pytest.fixture
def create(tmp_path: Path) -> Callable[..., Index]:
    """Make indexes with a quick encoder."""
    words.use()

    def make(name: str = "index", **options: Any) -> Index:
        return Index.create(tmp_path / name, encoder="words", options=options)

    return make
