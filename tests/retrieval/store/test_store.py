"""An index whose writer was killed, whose files are damaged, whose disk is full: its last commit, or a clear error."""

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
from pilotfish.retrieval.errors import DamagedIndex, LockedIndex, NewerFormat, RetrievalError

EVERYWHERE: dict[str, Any] = {  # all lists are read: what is there is found
    "xtr": {"nprobe": 1 << 20},
    "hybrid": {"settings": {"xtr": {"nprobe": 1 << 20}}},
}
CHILD = Path(__file__).parents[2] / "support" / "crash_child.py"


def kill_and_look(folder: Path, kills: int, seed: int) -> int:
    """Kill a writer ``kills`` times at random moments while readers read; returns how many changes were committed."""
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
    nursery = subprocess.Popen([sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(kills):
            lines = killed(
                nursery, f"{folder} {rng.randrange(1 << 30)} {number}", rng.randrange(8), rng.uniform(0.0, 0.1)
            )
            pending: tuple[str, list[str]] | None = None
            for line in lines:
                what, *names = line.split()
                number = max([number, *(int(n[1:]) + 1 for n in names if n != "start")])
                if what == "done" and pending is not None:
                    committed = committed | set(pending[1]) if pending[0] == "add" else committed - set(pending[1])
                    pending = None
                    changes += 1
                elif what != "done":
                    pending = None if what == "compact" else (what, names)
            opened = Index.open(folder)
            found = set(opened.ids())
            # What was under way is in wholly, or not at all.
            allowed = [committed]
            if pending is not None:
                allowed.append(committed | set(pending[1]) if pending[0] == "add" else committed - set(pending[1]))
            assert found in allowed, (pending, found ^ committed)
            committed = found
            opened.check()
            for name in rng.sample(sorted(found), min(3, len(found))):
                assert name in {h.id for h in opened.search(f"word{name}", 3, **EVERYWHERE.get(opened.kind.name, {}))}
            opened.close()
    finally:
        nursery.kill()
        nursery.communicate()
        ended.set()
        for thread in readers:
            thread.join()
    assert not errors, errors[0]
    return changes


def killed(nursery: subprocess.Popen[str], what: str, changes: int, after: float) -> list[str]:
    """What a writer says until it is killed: ``after`` seconds behind so many changes; slow machines get there too."""
    assert nursery.stdin is not None and nursery.stdout is not None
    nursery.stdin.write(what + "\n")
    nursery.stdin.flush()
    _, writer = nursery.stdout.readline().split()
    lines: list[str] = []
    while sum(line == "done\n" for line in lines) < changes:
        lines.append(nursery.stdout.readline())
    time.sleep(after)
    os.kill(int(writer), signal.SIGKILL)
    while (line := nursery.stdout.readline()) != "killed\n":
        assert line, "the process that forks writers has ended"
        lines.append(line)
    return lines


@pytest.mark.parametrize("kind", ["xtr", "vdr", "hybrid"])
def test_a_killed_writer_loses_nothing_that_was_committed(create, tmp_path: Path, kind: str) -> None:
    create(kind=kind).add([{"id": "start", "text": "wordstart in text"}])
    assert kill_and_look(tmp_path / "index", 4, 0) > 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", ["xtr", "vdr", "hybrid"])
def test_two_hundred_kills(create, tmp_path: Path, kind: str) -> None:
    create(kind=kind).add([{"id": "start", "text": "wordstart in text"}])
    assert kill_and_look(tmp_path / "index", 200, 1) > 50


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
            at = content.index(b"word50 in text")  # elsewhere it may hold nothing
        path.write_bytes(content[:at] + bytes(255 - b for b in content[at : at + 8]) + content[at + 8 :])
    with pytest.raises(RetrievalError) as caught:
        opened = Index.open(tmp_path / "index")
        opened.search("word3 in text")  # whatever is there: an answer or an error, no crash
        opened.check()
    assert "\n" not in str(caught.value)
    named = "there is no index" if pattern == "CURRENT" and damage == "gone" else path.name
    assert named in str(caught.value) or (pattern == "CURRENT" and "CURRENT" in str(caught.value))


def test_a_later_format_is_refused(create, tmp_path: Path) -> None:
    filled(create)
    path = next((tmp_path / "index").glob("manifest-*.json"))
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(NewerFormat, match="written in format 2, this Pilotfish reads up to 1; upgrade it"):
        Index.open(tmp_path / "index")


@pytest.mark.parametrize("fails_at", range(1, 12))
def test_a_full_disk_leaves_the_last_commit(
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_folder_that_may_not_be_written_can_be_read(create, tmp_path: Path) -> None:
    filled(create).close()
    (tmp_path / "index").chmod(0o555)
    opened = Index.open(tmp_path / "index")
    assert opened.search("word3", 1)[0].id == "3"
    with pytest.raises(LockedIndex, match="may not be written"):
        opened.delete(["3"])
    (tmp_path / "index").chmod(0o755)


def test_one_writes_at_a_time(create, tmp_path: Path) -> None:
    index = filled(create)
    other = Index.open(tmp_path / "index")
    with index._store.writer(), pytest.raises(LockedIndex, match=rf"process {os.getpid()} writes to this index"):
        other.delete(["3"])
    assert other.delete(["3"]) == 1
    assert "3" not in index


def test_readers_see_commits_of_others_and_keep_what_they_hold(create, tmp_path: Path) -> None:
    index = filled(create)
    reader = Index.open(tmp_path / "index")
    held = reader.snapshot
    index.compact()
    index.add([{"id": "new", "text": "brand new"}])
    assert reader.search("brand new", 1)[0].id == "new"
    assert int(held.segments[0].arrays["documents"].max()) == 99  # its files are gone from the folder, not from it


def test_a_hundred_documents_are_found_at_once(create) -> None:
    index = create(dimension=0)
    index.add([{"id": str(i), "text": f"word{i} in text"} for i in range(2000)])
    started = time.perf_counter()
    index.add([{"id": f"n{i}", "text": f"new{i} in text"} for i in range(100)])
    assert index.search("new42", 1)[0].id == "n42"
    assert time.perf_counter() - started < 2  # a tenth of a second where nothing else runs; see the benchmark


def test_leftovers_of_a_crash_go_with_the_next_writer(create, tmp_path: Path) -> None:
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


def test_another_index_in_its_place_is_told(create, tmp_path: Path) -> None:
    reader = filled(create)
    shutil.rmtree(tmp_path / "index")
    create().add([{"id": "other", "text": "word3 in text"}])
    for _ in range(2):
        with pytest.raises(DamagedIndex, match="another index is there now"):
            reader.search("word3", 1)
    assert Index.open(tmp_path / "index").search("word3", 1)[0].id == "other"


def test_a_late_reader_does_not_take_a_writer_back(create, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that loads a commit slowly, while the next one is made, must not leave its own behind."""
    index = filled(create)
    store, real = index._store, index._store._load
    loaded, goes_on = threading.Event(), threading.Event()

    def slow(about: Any) -> Any:
        snapshot = real(about)
        if threading.current_thread() is reader:
            loaded.set()
            goes_on.wait(5)
        return snapshot

    monkeypatch.setattr(store, "_load", slow)
    reader = threading.Thread(target=lambda: len(index))
    other = Index.open(store.folder)
    other.add([{"id": "one", "text": "one"}])
    reader.start()
    assert loaded.wait(5)
    threading.Timer(0.3, goes_on.set).start()
    index.add([{"id": "two", "text": "two"}])
    reader.join()
    index.add([{"id": "three", "text": "three"}])
    index.check()
    assert {"one", "two", "three"} <= set(index.ids())


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_is_an_error_or_an_answer(create, tmp_path: Path, seed: int) -> None:
    """Bytes changed anywhere, heads of files above all: never another kind of error than ours."""
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


def test_metadata_that_are_damaged_are_told(create, tmp_path: Path) -> None:
    filled(create).close()
    with sqlite3.connect(tmp_path / "index" / "documents.db") as database:
        database.execute("UPDATE documents SET metadata = '{' WHERE id = '3'")
    with pytest.raises(DamagedIndex, match="metadata of row 3 are damaged"):
        Index.open(tmp_path / "index").get("3")


def test_a_full_disk_at_the_beginning(tmp_path: Path, create, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        create()
    monkeypatch.undo()
    index = create()
    index.add([{"id": "a", "text": "begun anew"}])
    assert index.search("anew", 1)[0].id == "a"


def test_a_disk_without_room_for_side_files_can_be_read(create, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_threads_that_come_and_go_leave_no_files_open(create) -> None:
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
