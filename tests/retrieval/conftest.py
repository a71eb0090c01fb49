"""What tests of indexes share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import words

from pilotfish.retrieval import Index


@pytest.fixture
def create(tmp_path: Path) -> Callable[..., Index]:
    """Make indexes with quick encoders."""
    words.use()

    def make(name: str = "index", kind: str = "xtr", **options: Any) -> Index:
        encoder, usual = words.KINDS[kind]
        return Index.create(tmp_path / name, kind, encoder, {**(usual if kind != "xtr" else {}), **options})

    make.folder = tmp_path / "index"  # type: ignore[attr-defined]
    return make
