"""Tests of synchronization after interrupted additions, deletions, and of folders that cannot be read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import words
from fastapi.testclient import TestClient

from pilotfish.retrieval import Index, file_finder
from pilotfish.retrieval.errors import RetrievalError
from pilotfish.retrieval.loaders import Chunker, DocumentSource
from pilotfish.retrieval.server import create_index_app


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit additions in batches of three documents."""
    monkeypatch.setattr("pilotfish.retrieval.validation.BATCH", 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text("".join(f"alpha{i} " for i in range(40)))
    (path / "sub" / "b.md").write_text("beta " * 5)
    return path


def source(folder: Path) -> DocumentSource:
    return DocumentSource([folder], Chunker(words.Words, 8, 0), number_ids=True)


def sync(index: Index, folder: Path) -> Any:
    return index.sync([folder], chunk_tokens=8, overlap=0, number_ids=True)


def texts(index: Index) -> list[str]:
    return sorted(d.text for d in index.select())


def stop_after(count: int, documents: DocumentSource) -> Any:
    """Return the documents of a source whose iteration fails after some of them, as if the process had been killed."""

    class Stopped:
        whole_sources = True

        def __iter__(self) -> Any:
            for number, document in enumerate(documents):
                if number == count:
                    raise KeyboardInterrupt
                yield document

    return Stopped()


@pytest.mark.parametrize("count", [3, 4])
def test_sync_completes_a_file_whose_addition_was_interrupted(create: Callable, folder: Path, count: int) -> None:
    index = create(kind="bm25")
    with pytest.raises(KeyboardInterrupt):
        index.add(stop_after(count, source(folder)))
    assert len(index) == 3
    report = sync(index, folder)
    assert report.changed == ["a.txt"] and report.added == ["sub/b.md"]
    assert texts(index) == sorted(d.text for d in source(folder))
    assert not sync(index, folder)


def test_sync_restores_documents_that_were_deleted(create: Callable, folder: Path) -> None:
    index = create(kind="bm25")
    sync(index, folder)
    for name in ("a.txt#0", "a.txt#4", "sub/b.md#0"):
        index.delete([name])
        assert sync(index, folder)
        assert texts(index) == sorted(d.text for d in source(folder))
    assert not sync(index, folder)


def test_a_resumed_build_reads_changed_files_again(create: Callable, folder: Path) -> None:
    index = create(kind="bm25")
    with pytest.raises(KeyboardInterrupt):
        index.add(stop_after(4, source(folder)))
    (folder / "a.txt").write_text("".join(f"omega{i} " for i in range(30)))
    index.resume(source(folder))
    assert texts(index) == sorted(d.text for d in source(folder))
    assert not sync(index, folder)


def test_a_resumed_build_keeps_documents_of_unchanged_files(create: Callable, folder: Path) -> None:
    index = create(kind="bm25")
    with pytest.raises(KeyboardInterrupt):
        index.add(stop_after(4, source(folder)))
    assert index.resume(source(folder)) == len(list(source(folder))) - 3
    assert not sync(index, folder)


def test_documents_of_a_broken_link_stay(create: Callable, folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.txt"
    real.write_text("linked text")
    (folder / "link.txt").symlink_to(real)
    index = create(kind="bm25")
    sync(index, folder)
    real.rename(tmp_path / "moved.txt")
    report = sync(index, folder)
    assert not report and "broken link" in report.skipped["link.txt"]
    assert "linked text" in texts(index)


def test_documents_of_a_folder_that_cannot_be_read_stay(
    create: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = create(kind="bm25")
    sync(index, folder)
    before, walk = texts(index), os.walk

    def denied(top: Path, onerror: Callable[[OSError], None]) -> Any:
        for place, folders, names in walk(top):
            if "sub" in folders:
                folders.remove("sub")
                onerror(PermissionError(13, "Permission denied", str(Path(top) / "sub")))
            yield place, folders, names

    monkeypatch.setattr(file_finder.os, "walk", denied)
    report = sync(index, folder)
    assert not report and report.skipped == {"sub/": "sub/: Permission denied"}
    assert texts(index) == before
    with pytest.raises(RetrievalError, match="sub/: Permission denied"):
        source(folder)


def test_a_path_that_cannot_be_read_is_refused(create: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, other = create(kind="bm25"), folder.parent / "other"
    other.mkdir()
    (other / "c.txt").write_text("gamma")
    index.sync([folder, other], number_ids=True)
    before, walk = texts(index), os.walk

    def denied(top: Path, onerror: Callable[[OSError], None]) -> Any:
        if Path(top) == folder:
            onerror(PermissionError(13, "Permission denied", str(top)))
            return
        yield from walk(top)

    monkeypatch.setattr(file_finder.os, "walk", denied)
    with pytest.raises(RetrievalError, match="files: Permission denied"):
        index.sync([folder, other], number_ids=True)
    assert texts(index) == before


def test_a_named_pipe_is_skipped(create: Callable, folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    report = sync(create(kind="bm25"), folder)
    assert report.skipped == {"pipe.txt": "pipe.txt: is not a regular file"}


@pytest.mark.parametrize(("path", "message"), [("", "a path is empty"), ("-", "standard input")])
def test_paths_without_files_are_refused(create: Callable, folder: Path, path: str, message: str) -> None:
    index = create(kind="bm25")
    sync(index, folder)
    before = texts(index)
    with pytest.raises(RetrievalError, match=message):
        index.sync([path])
    assert texts(index) == before


def test_endpoint_needs_no_body(create: Callable, folder: Path) -> None:
    client = TestClient(create_index_app(create(kind="bm25"), sync_paths=[str(folder)]), base_url="http://localhost")
    assert client.post("/sync").json()["added"] == ["a.txt", "sub/b.md"]


def test_ids_that_come_twice_name_both_files(create: Callable, tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text('{"id": "d", "text": "x"}\n')
    with pytest.raises(RetrievalError, match=r"'d' comes twice, from one\.jsonl and two\.jsonl"):
        create(kind="bm25").sync([tmp_path])


@pytest.mark.parametrize("codec", ["rot13", "hex", "uu", "base64", "quopri", "zlib", "bz2", "no-such-codec"])
def test_declared_codecs_that_are_no_encodings_are_ignored(tmp_path: Path, codec: str) -> None:
    (tmp_path / "a.html").write_text(f'<meta charset="{codec}"><p>größer', encoding="utf-8")
    (document,) = source(tmp_path)
    assert document.text == "größer"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_tables_without_records_are_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    documents = source(tmp_path)
    assert list(documents) == []
    assert documents.skipped == {"a.jsonl": "a.jsonl: no records"}


def test_several_filters_all_have_to_hold(cli: Any, tmp_path: Path) -> None:
    rows = "".join(f'{{"id": "{n}", "text": "fish", "year": {n}}}\n' for n in (1998, 1999, 2000))
    (tmp_path / "a.jsonl").write_text(rows)
    assert cli("index", "build", str(tmp_path / "i"), str(tmp_path / "a.jsonl"), "--kind", "bm25").returncode == 0
    two = ("--where", "year > 1998", "--where", "year < 2000 OR year = 2100")
    found = cli("index", "search", str(tmp_path / "i"), "fish", *two, "--json")
    assert '"1999"' in found.stdout and '"1998"' not in found.stdout and '"2000"' not in found.stdout
    deleted = cli("index", "delete", str(tmp_path / "i"), *two)
    assert "1 documents deleted, 2 left" in deleted.stdout + deleted.stderr
