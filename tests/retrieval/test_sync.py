"""Tests of re-ingestion and synchronization: the passages of an index are those of the files that exist."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import words
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import Index
from pilotfish.retrieval.errors import RetrievalError
from pilotfish.retrieval.loaders import Chunker, DocumentSource
from pilotfish.retrieval.server import create_index_app
from pilotfish.retrieval.sync import SyncReport

KINDS = ["xtr", "vdr", "bm25", "hybrid"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text("alpha " * 20)
    (path / "sub" / "b.md").write_text("beta " * 5)
    (path / "c.jsonl").write_text('{"id": "r1", "text": "gamma one"}\n{"id": "r2", "text": "gamma two"}\n')
    return path


def contents(index: Index) -> dict[str, list[str]]:
    """Return the texts of each source, and check the other views of the index against them."""
    found: dict[str, list[str]] = {}
    for document in index.select():
        found.setdefault(str(document.source), []).append(document.text)
    assert {k: len(v) for k, v in found.items() if k != "None"} == index.sources()
    index.check()
    return found


def expected(folder: Path, chunk_tokens: int = 8) -> dict[str, list[str]]:
    """Return the texts of each file, read without an index."""
    found: dict[str, list[str]] = {}
    for document in DocumentSource([folder], Chunker(words.Words, chunk_tokens, 0), number_ids=True):
        found.setdefault(str(document.source), []).append(document.text)
    return found


def sync(index: Index, folder: Path, **options: Any) -> SyncReport:
    return index.sync([folder], **{"chunk_tokens": 8, "overlap": 0, "number_ids": True, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_added_changed_and_removed(create: Callable, folder: Path, kind: str) -> None:
    index = create(kind=kind)
    index.add([{"id": "mine", "text": "not from a file"}])
    report = sync(index, folder)
    assert (report.added, report.changed, report.removed) == (["a.txt", "c.jsonl", "sub/b.md"], [], [])
    assert contents(index) == {**expected(folder), "None": ["not from a file"]}
    (folder / "a.txt").write_text("now one line of delta")
    (folder / "c.jsonl").unlink()
    (folder / "new.txt").write_text("epsilon")
    before = index.snapshot.manifest.number
    report = sync(index, folder)
    assert (report.added, report.changed, report.removed, report.unchanged) == (
        ["new.txt"],
        ["a.txt"],
        ["c.jsonl"],
        1,
    )
    assert (report.documents_added, report.documents_removed) == (2, 5)
    assert index.snapshot.manifest.number == before + 1, "one commit"
    assert contents(index) == {**expected(folder), "None": ["not from a file"]}
    wide = {"nprobe": 1 << 20} if kind == "xtr" else {}
    assert index.search("alpha", 10, **wide) == [] or all("alpha" not in h.text for h in index.search("alpha", 10))
    hit = index.search("delta", 1, **wide)[0]
    assert (hit.source, hit.text) == ("a.txt", "now one line of delta")


def test_a_second_synchronization_writes_nothing(create: Callable, folder: Path) -> None:
    index = create()
    assert sync(index, folder)
    before = index.snapshot.manifest.number
    os.utime(folder / "a.txt", (1, 1))
    report = sync(index, folder)
    assert not report and report == SyncReport(unchanged=3)
    assert index.snapshot.manifest.number == before


def test_dry_run_reports_the_same_and_writes_nothing(create: Callable, folder: Path) -> None:
    index = create()
    sync(index, folder)
    (folder / "a.txt").write_text("other")
    (folder / "c.jsonl").unlink()
    before = index.snapshot.manifest.number
    planned = sync(index, folder, dry_run=True)
    assert index.snapshot.manifest.number == before
    assert planned == sync(index, folder)


def test_other_chunk_settings_are_a_change_of_texts(create: Callable, folder: Path) -> None:
    index = create()
    sync(index, folder)
    report = sync(index, folder, chunk_tokens=4)
    assert (report.changed, report.unchanged) == (["a.txt", "sub/b.md"], 1)
    assert contents(index) == expected(folder, 4)


def test_a_file_that_cannot_be_read_keeps_its_earlier_version(create: Callable, folder: Path) -> None:
    index = create()
    sync(index, folder)
    before = contents(index)
    (folder / "c.jsonl").write_text('{"id": "r1", "text": ')
    (folder / "a.txt").write_text("")
    with pytest.raises(RetrievalError, match=r"c\.jsonl"):
        sync(index, folder, skip_bad=False)
    assert contents(index) == before
    report = sync(index, folder)
    assert (report.changed, report.removed) == (["a.txt"], [])
    assert set(report.skipped) == {"a.txt", "c.jsonl"}
    del before["a.txt"]
    assert contents(index) == before, "an empty file has no documents, a damaged one keeps those it had"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.jsonl": '{"id": "mine", "text": "x"}'}, "'mine' is in the index already; use upsert"),
        ({"x.jsonl": '{"id": "twice", "text": "x"}\n{"id": "twice", "text": "y"}'}, "'twice' comes twice"),
        ({"x.jsonl": '{"id": "b", "text": "x"}', "y.jsonl": '{"id": "b", "text": "x"}'}, "'b' comes twice"),
    ],
)
def test_ids_that_are_taken_are_refused(create: Callable, folder: Path, files: dict[str, str], message: str) -> None:
    index = create()
    index.add([{"id": "mine", "text": "not from a file"}])
    sync(index, folder)
    before = contents(index)
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "a.txt").write_text("changed too")
    with pytest.raises(RetrievalError, match=message):
        sync(index, folder)
    assert contents(index) == before


def test_a_record_may_move_to_another_file(create: Callable, folder: Path) -> None:
    index = create()
    sync(index, folder)
    (folder / "c.jsonl").rename(folder / "d.jsonl")
    report = sync(index, folder)
    assert (report.added, report.removed) == (["d.jsonl"], ["c.jsonl"])
    assert contents(index) == expected(folder)


def test_a_missing_folder_removes_nothing(create: Callable, folder: Path, tmp_path: Path) -> None:
    index = create()
    sync(index, folder)
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty"):
        with pytest.raises(RetrievalError, match=path):
            index.sync([tmp_path / path])
    assert len(index.sources()) == 3


def test_an_index_may_grow_beyond_its_first_batch(
    create: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.retrieval.index_writer.BATCH", 3)
    index = create()
    lines = [json.dumps({"id": f"n{i}", "text": f"word{i} in text"}) for i in range(20)]
    (folder / "many.jsonl").write_text("\n".join(lines))
    sync(index, folder)
    assert contents(index) == expected(folder)
    assert index.search("word17", 1, nprobe=1 << 20)[0].id == "n17"


OPERATIONS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["txt", "jsonl"]), st.integers(0, 9)), max_size=5
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(OPERATIONS, min_size=1, max_size=4))
def test_any_changes_of_files_give_the_same_index_as_a_new_build(
    tmp_path: Path, rounds: list[list[tuple[str, str, int]]]
) -> None:
    words.use()
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "always.txt").write_text("always here")
    with Index.create(folder / "index", "xtr", "words", {"dimension": 0}) as index:
        for operations in rounds:
            for name, suffix, size in operations:
                path = folder / f"{name}.{suffix}"
                if size == 0:
                    path.unlink(missing_ok=True)
                elif suffix == "txt":
                    path.write_text(f"word{size} " * size * 3)
                else:
                    path.write_text("\n".join(json.dumps({"text": f"record{size} {i}"}) for i in range(size)))
            before = index.snapshot.manifest.number
            report = sync(index, folder)
            assert contents(index) == expected(folder)
            assert index.snapshot.manifest.number == before + bool(report)
            assert not sync(index, folder)


# ------------------------------------------------------------------------------------------------------- re-ingestion


@pytest.mark.parametrize("kind", KINDS)
def test_adding_a_file_again_replaces_all_of_its_passages(create: Callable, folder: Path, kind: str) -> None:
    index = create(kind=kind)

    def add(path: Path) -> int:
        return index.add(DocumentSource([path], Chunker(words.Words, 4, 0)))

    add(folder / "a.txt")
    add(folder / "c.jsonl")
    assert index.sources() == {"a.txt": 5, "c.jsonl": 2}
    (folder / "a.txt").write_text("one line")
    (folder / "c.jsonl").write_text('{"id": "r2", "text": "gamma changed"}')
    assert add(folder / "a.txt") == add(folder / "c.jsonl") == 1
    assert contents(index) == {"a.txt": ["one line"], "c.jsonl": ["gamma changed"]}


def test_documents_of_a_source_are_replaced_on_request(create: Callable) -> None:
    index = create()

    def passages(name: str, *texts: str) -> list[dict[str, str]]:
        return [{"id": f"{name}#{i}", "text": text, "source": name} for i, text in enumerate(texts)]

    index.add(passages("a", "one", "two", "three"))
    index.add(passages("b", "other"))
    with pytest.raises(RetrievalError, match="'a#0' is in the index already, from a"):
        index.add(passages("a", "changed"))
    assert index.add(passages("a", "changed"), replace_sources=True) == 1
    assert contents(index) == {"a": ["changed"], "b": ["other"]}
    index.upsert(passages("b", "x", "y"), replace_sources=True)
    index.upsert(passages("b", "z"))
    assert contents(index) == {"a": ["changed"], "b": ["y", "z"]}


def test_a_source_that_spans_batches_is_replaced_once(create: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.retrieval.validation.BATCH", 3)
    index = create()
    for count in (10, 7, 2):
        documents = [{"id": f"{count}-{i}", "text": f"word{i}", "source": "big"} for i in range(count)]
        assert index.add(documents, replace_sources=True) == count
        assert index.sources() == {"big": count}


# ------------------------------------------------------------------------------------------------- commands and HTTP


def test_command(preloaded_cli: Any, folder: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    options = ("--number-ids",)
    assert preloaded_cli("index", "build", place, str(folder), "--kind", "bm25", *options).returncode == 0
    (folder / "a.txt").write_text("delta")
    (folder / "sub" / "b.md").unlink()
    (folder / "z.txt").write_text("zeta")
    planned = preloaded_cli("index", "sync", place, str(folder), "--dry-run", *options)
    assert planned.stdout.splitlines() == ["added   z.txt", "changed a.txt", "removed sub/b.md"]
    assert "1 added, 1 changed, 1 removed, 1 unchanged" in planned.stderr and "nothing was written" in planned.stderr
    done = preloaded_cli("index", "sync", place, str(folder), "--json", *options)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert json.loads(done.stdout) == {
        "added": ["z.txt"], "changed": ["a.txt"], "removed": ["sub/b.md"], "unchanged": 1, "skipped": {},
        "documents_added": 2, "documents_removed": 2, "documents": 4,
    }  # fmt: skip
    again = preloaded_cli("index", "sync", place, str(folder), *options)
    assert "0 added, 0 changed, 0 removed, 3 unchanged" in again.stderr
    assert "there is no index" in preloaded_cli("index", "sync", str(tmp_path / "none"), str(folder)).stderr
    added = preloaded_cli("index", "add", place, str(folder / "a.txt"))
    assert "1 documents added, 4 in all" in added.stderr, "the same file again"


def test_endpoint(create: Callable, folder: Path) -> None:
    index = create(kind="bm25")
    client = TestClient(create_index_app(index, sync_paths=[str(folder)]), base_url="http://localhost")
    planned = client.post("/sync", json={"dry_run": True}).json()
    assert (planned["added"], len(index)) == (["a.txt", "c.jsonl", "sub/b.md"], 0)
    assert client.post("/sync", json={}).json() == planned
    assert client.post("/sync", json={}).json()["unchanged"] == 3
    hit = client.post("/search", json={"query": "alpha"}).json()["hits"][0]
    assert (hit["id"], hit["source"], hit["text"]) == ("a.txt#0", "a.txt", None)
    again = {"documents": [{"id": "n", "text": "new", "source": "a.txt"}], "replace_sources": True}
    assert client.post("/documents", json=again).json() == {"changed": 1, "documents": 4}
    assert client.get("/documents/n").json()["source"] == "a.txt"
    without = TestClient(create_index_app(index), base_url="http://localhost")
    assert without.post("/sync", json={}).status_code == 404
