"""Tests of builds in a temporary folder: failed, interrupted, resumed and concurrent ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pilotfish.retrieval import Index, RetrievalError
from pilotfish.retrieval.build import build_folder, partial_folder
from pilotfish.retrieval.errors import LockedIndex


def put(create: Callable, partial: Path, count: int) -> None:
    """Build an index of ``count`` documents in the temporary folder."""
    with create(partial.relative_to(create.folder.parent)) as index:  # type: ignore[attr-defined]
        if count:
            index.add([{"id": str(i), "text": f"word{i}"} for i in range(count)])


def test_index_appears_when_it_is_complete(create: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with build_folder(folder) as partial:
        put(create, partial, 3)
        assert not folder.exists()
    with Index.open(folder) as index:
        assert len(index) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("error", [RetrievalError("bad"), OSError(28, "full"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("count", [0, 3])
def test_committed_documents_of_a_failed_build_can_be_resumed(
    create: Callable, tmp_path: Path, error: BaseException, count: int
) -> None:
    folder = tmp_path / "new"
    with pytest.raises(type(error)) as caught, build_folder(folder) as partial:
        put(create, partial, count)
        raise error
    assert not folder.exists()
    assert partial_folder(folder).exists() is bool(count)
    if count and isinstance(error, RetrievalError):
        assert str(caught.value) == "bad; --resume continues after the 3 documents indexed so far"
    with build_folder(folder, resume=bool(count)) as partial:
        assert partial.exists() is bool(count)
        if not count:
            put(create, partial, 1)
    with Index.open(folder) as index:
        assert len(index) == (count or 1)


def test_new_build_discards_an_interrupted_one(create: Callable, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), build_folder(tmp_path / "new") as partial:
        put(create, partial, 3)
        raise KeyboardInterrupt
    with build_folder(tmp_path / "new") as partial:
        assert not partial.exists()
        put(create, partial, 1)
    with Index.open(tmp_path / "new") as index:
        assert len(index) == 1


def test_existing_folders(create: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with build_folder(tmp_path / "empty") as partial:
        put(create, partial, 1)
    with pytest.raises(RetrievalError, match="holds an index already"), build_folder(tmp_path / "empty"):
        pytest.fail("the block must not run")
    with pytest.raises(RetrievalError, match="lies in another index"), build_folder(tmp_path / "empty" / "inner"):
        pytest.fail("the block must not run")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(RetrievalError, match="not empty"), build_folder(tmp_path / "used"):
        pytest.fail("the block must not run")
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(RetrievalError, match="mount point"), build_folder(tmp_path / "volume"):
        pytest.fail("the block must not run")


def test_two_builds_of_one_folder(create: Callable, tmp_path: Path) -> None:
    with build_folder(tmp_path / "new") as partial:
        put(create, partial, 1)
        with Index.open(partial) as index, index._store.writer(), pytest.raises(LockedIndex):  # noqa: SIM117
            with build_folder(tmp_path / "new"):
                pytest.fail("the block must not run")
