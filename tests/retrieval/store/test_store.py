"""Tests of indexes after killed writers, damaged files and full disks: the last commit opens, or the error is clear."""

import contextlib
import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import words

from pilotfish._internal import atomic_write
from pilotfish.retrieval import Index
from pilotfish.retrieval.errors import DamagedIndex, LockedIndex, NewerFormat, OlderFormat, RetrievalError

EVERYWHERE: dict[str, Any] = {  # read all inverted lists
    "xtr": {"nprobe": 1 << 20},
    "hybrid": {"settings": {"xtr": {"nprobe": 1 << 20}}},
}
CHILD = Path(__file__).parents[2] / "support" / "crash_child.py"


def kill_writers_and_check(folder: Path, kills: int, seed: int) -> int:
    """Kill a writer ``kills`` times at random moments during reads, and return the number of committed changes."""
    rng = random.Random(seed)
    committed: set[str] = set(Index.open(folder).ids())
    changes = number = 0
    ended = threading.Event()
    errors: list[Exception] = []

    def read() -> None:
        try:
            reader = Index.open(folder)
            while not ended.is_set():
                hits = reader.search(f"wordd{rng.randrange(100)} in text", 3)
                assert all(h.text.startswith("word") for h in hits)
        except Exception as error:
            errors.append(error)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for thread in readers:
        thread.start()
    forker = subprocess.Popen([sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(kills):
            lines = run_writer_until_killed(
                forker, f"{folder} {rng.randrange(1 << 30)} {number}", rng.randrange(8), rng.uniform(0.0, 0.1)
            )
            pending: tuple[str, list[str]] | None = None
            for line in lines:
                operation, *names = line.split()
                number = max([number, *(int(n[1:]) + 1 for n in names if n != "start")])
                if operation == "done" and pending is not None:
                    committed = after_change(committed, *pending)
                    pending = None
                    changes += 1
                elif operation != "done":
                    pending = None if operation == "compact" else (operation, names)
            opened = Index.open(folder)
            present = set(opened.ids())
            # The change in progress is either complete or absent.
            allowed = [committed]
            if pending is not None:
                allowed.append(after_change(committed, *pending))
            assert present in allowed, (pending, present ^ committed)
            committed = present
            opened.check()
            for name in rng.sample(sorted(present), min(3, len(present))):
                assert name in {h.id for h in opened.search(f"word{name}", 3, **EVERYWHERE.get(opened.kind.name, {}))}
            opened.close()
    finally:
        forker.kill()
        forker.communicate()
        ended.set()
        for thread in readers:
            thread.join()
    assert not errors, errors[0]
    return changes


def after_change(committed: set[str], operation: str, names: list[str]) -> set[str]:
    """Return the ids after a change; those of documents of files begin with f."""
    match operation:
        case "add":
            return committed | set(names)
        case "delete":
            return committed - set(names)
        case "sync":
            return {name for name in committed if not name.startswith("f")} | set(names)
    raise ValueError(operation)


def run_writer_until_killed(forker: subprocess.Popen[str], what: str, changes: int, after: float) -> list[str]:
    """Start a writer, kill it ``after`` seconds after its first ``changes`` changes, and return its output lines."""
    assert forker.stdin is not None and forker.stdout is not None
    forker.stdin.write(what + "\n")
    forker.stdin.flush()
    _, writer = forker.stdout.readline().split()
    lines: list[str] = []
    while sum(line == "done\n" for line in lines) < changes:
        lines.append(forker.stdout.readline())
    time.sleep(after)
    os.kill(int(writer), signal.SIGKILL)
    while (line := forker.stdout.readline()) != "killed\n":
        assert line, "the process that forks writers has ended"
        lines.append(line)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xtr", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("vdr", "hybrid"))])
def test_killed_writer_loses_no_committed_change(create, tmp_path: Path, kind: str) -> None:
    create(kind=kind).add([{"id": "start", "text": "wordstart in text"}])
    assert kill_writers_and_check(tmp_path / "index", 4, 0) > 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", ["xtr", "vdr", "hybrid"])
def test_two_hundred_killed_writers_lose_no_committed_change(create, tmp_path: Path, kind: str) -> None:
    create(kind=kind).add([{"id": "start", "text": "wordstart in text"}])
    assert kill_writers_and_check(tmp_path / "index", 200, 1) > 50


def filled(create: Any, kind: str = "xtr") -> Index:
    index = create(kind=kind)
    index.add([{"id": str(i), "text": f"word{i} in text"} for i in range(100)])
    index.add([{"id": "more", "text": "more text"}])
    index.delete(["7"])
    return index


PATTERNS = (
    ("xtr", "CURRENT"),
    ("xtr", "manifest-*.json"),
    ("xtr", "shared-*centroids*"),
    ("xtr", "segment-0-codes*"),
    ("xtr", "segment-0-starts*"),
    ("xtr", "live-*"),
    ("xtr", "documents.db"),
    ("vdr", "segment-0-term_starts*"),
    ("vdr", "segment-0-sizes*"),
    ("vdr", "segment-0-skips*"),
    ("vdr", "segment-0-impacts*"),
    ("hybrid", "segment-0-vdr.places*"),
    ("hybrid", "segment-0-xtr.starts*"),
)


@pytest.mark.parametrize(("kind", "pattern"), PATTERNS)
@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "empty"])
def test_damaged_files_are_named(create, tmp_path: Path, kind: str, pattern: str, damage: str) -> None:
    index = filled(create, kind)
    index.close()
    path = sorted((tmp_path / "index").glob(pattern))[-1]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        at = len(content) - max(len(content) // 4, 1)
        if pattern == "documents.db":
            at = content.index(b"word50 in text")  # other bytes may be unused
        path.write_bytes(content[:at] + bytes(255 - b for b in content[at : at + 8]) + content[at + 8 :])
    with pytest.raises(RetrievalError) as caught:
        opened = Index.open(tmp_path / "index")
        opened.search("word3 in text")  # gives an answer or an error, and does not crash
        opened.check()
    assert "\n" not in str(caught.value)
    expected = "there is no index" if pattern == "CURRENT" and damage == "gone" else path.name
    assert expected in str(caught.value) or (pattern == "CURRENT" and "CURRENT" in str(caught.value))


def test_refuses_other_formats(create, tmp_path: Path) -> None:
    filled(create)
    path = next((tmp_path / "index").glob("manifest-*.json"))
    text = path.read_text()
    path.write_text(text.replace('"format": 2', '"format": 3'))
    with pytest.raises(NewerFormat, match="written in format 3, this Pilotfish reads up to 2; update Pilotfish"):
        Index.open(tmp_path / "index")
    path.write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(OlderFormat, match=r"format 1 by an earlier version .* build the index again"):
        Index.open(tmp_path / "index")


@pytest.mark.parametrize("fails_at", range(1, 12))
def test_full_disk_keeps_the_last_commit(
    create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    index = filled(create)
    before, count = sorted(index.ids()), 0
    real = os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    try:
        index.upsert([{"id": "7", "text": "again"}, {"id": "8", "text": "changed"}])
    except OSError as error:
        assert error.errno == errno.ENOSPC
        opened = Index.open(tmp_path / "index")
        opened.check()
        assert sorted(opened.ids()) in (before, sorted([*before, "7"]))
        monkeypatch.undo()
        opened.upsert([{"id": "9", "text": "still works"}])
        assert opened.search("still works", 1)[0].id == "9"
    else:
        assert count < fails_at


def test_refuses_a_change_within_a_change(create, tmp_path: Path) -> None:
    index = filled(create)
    other = Index.open(tmp_path / "index")
    with (
        index._store.writer(),
        pytest.raises(LockedIndex, match=rf"process {os.getpid()} writes to this index in this thread"),
    ):
        other.delete(["3"])
    assert other.delete(["3"]) == 1
    assert "3" not in index


def test_readers_see_new_commits_and_keep_open_snapshots(create, tmp_path: Path) -> None:
    index = filled(create)
    reader = Index.open(tmp_path / "index")
    held = reader.snapshot
    index.compact()
    index.add([{"id": "new", "text": "brand new"}])
    assert reader.search("brand new", 1)[0].id == "new"
    # The files are deleted from the folder, but still open.
    assert int(held.segments[0].arrays["documents"].max()) == 99


def test_hundred_documents_are_added_and_found_quickly(create) -> None:
    index = create(dimension=0)
    begin = time.perf_counter()
    index.add([{"id": str(i), "text": f"word{i} in text"} for i in range(2000)])
    started = time.perf_counter()
    index.add([{"id": f"n{i}", "text": f"new{i} in text"} for i in range(100)])
    assert index.search("new42", 1)[0].id == "n42"
    assert time.perf_counter() - started < started - begin  # twenty times as many documents took longer


def test_next_writer_removes_files_of_a_crash(create, tmp_path: Path) -> None:
    index = filled(create)
    (tmp_path / "index" / "segment-99-codes.npy").write_bytes(b"half")
    index._store.documents.add(index.snapshot.manifest.next_document, [words_document("ghost")])
    assert "ghost" not in set(index.ids())
    index.add([{"id": "next", "text": "next"}])
    assert set(index.ids()) >= {"next"}
    assert "ghost" not in set(index.ids())
    assert not (tmp_path / "index" / "segment-99-codes.npy").exists()
    assert isinstance(DamagedIndex("x"), RetrievalError)


def words_document(name: str) -> Any:
    from pilotfish.retrieval.store.documents import Document

    words.use()
    return Document(name, "boo", {})


def test_replaced_index_is_reported(create, tmp_path: Path) -> None:
    reader = filled(create)
    shutil.rmtree(tmp_path / "index")
    create().add([{"id": "other", "text": "word3 in text"}])
    for _ in range(2):
        with pytest.raises(DamagedIndex, match="another index is there now"):
            reader.search("word3", 1)
    assert Index.open(tmp_path / "index").search("word3", 1)[0].id == "other"


def test_slow_reader_does_not_replace_a_newer_snapshot(create, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that a thread that loads an older commit slowly does not replace a newer one."""
    index = filled(create)
    store, real = index._store, index._store._load
    loaded, goes_on = threading.Event(), threading.Event()

    def slow(about: Any) -> Any:
        snapshot = real(about)
        if threading.current_thread() is reader:
            loaded.set()
            goes_on.wait(60)
        return snapshot

    monkeypatch.setattr(store, "_load", slow)
    reader = threading.Thread(target=lambda: len(index))
    other = Index.open(store.folder)
    other.add([{"id": "one", "text": "one"}])
    reader.start()
    assert loaded.wait(60)
    threading.Timer(0.3, goes_on.set).start()
    index.add([{"id": "two", "text": "two"}])
    reader.join()
    index.add([{"id": "three", "text": "three"}])
    index.check()
    assert {"one", "two", "three"} <= set(index.ids())


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_gives_an_answer_or_retrieval_error(create, tmp_path: Path, seed: int) -> None:
    """Test that changed bytes, mostly in file headers, raise no error other than `RetrievalError`."""
    rng = random.Random(seed)
    kind = rng.choice(["xtr", "vdr"])
    filled(create, kind).close()
    path = rng.choice(sorted(p for p in (tmp_path / "index").iterdir() if p.stat().st_size and "lock" not in p.name))
    content = bytearray(path.read_bytes())
    at = rng.randrange(min(len(content), 128 if rng.random() < 0.6 else len(content)))
    content[at : at + 8] = rng.randbytes(len(content[at : at + 8]))
    path.write_bytes(content)
    for act in (lambda i: i.search("word3 in text"), lambda i: i.check(), lambda i: list(i.ids())):
        with contextlib.suppress(RetrievalError), Index.open(tmp_path / "index") as opened:
            act(opened)


def test_damaged_metadata_are_reported(create, tmp_path: Path) -> None:
    filled(create).close()
    with sqlite3.connect(tmp_path / "index" / "documents.db") as database:
        database.execute("UPDATE documents SET metadata = '{' WHERE id = '3'")
    with pytest.raises(DamagedIndex, match="metadata of row 3 are damaged"):
        Index.open(tmp_path / "index").get("3")


def test_create_works_after_full_disk(tmp_path: Path, create, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        create()
    monkeypatch.undo()
    index = create()
    index.add([{"id": "a", "text": "begun anew"}])
    assert index.search("anew", 1)[0].id == "a"


def test_index_is_read_without_room_for_sqlite_side_files(create, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(create).close()
    real = sqlite3.connect

    def no_room(place: str, **more: Any) -> Any:
        if "immutable" not in place:
            raise sqlite3.OperationalError("disk I/O error")
        return real(place, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", no_room)
        reader = Index.open(create.folder)
        assert reader.search("word3", 1)[0].id == "3"
    Index.open(create.folder).add([{"id": "later", "text": "there is room again"}])
    assert reader.search("room again", 1)[0].id == "later"


def test_finished_threads_leave_no_open_files(create) -> None:
    index = filled(create)

    def burst(count: int) -> int:
        threads = [threading.Thread(target=index.search, args=("word3", 1)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = burst(20)
    assert burst(60) <= before + 8
