"""An index whose writer was killed, whose files are damaged, whose disk is full: its last commit, or a clear error."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import words

from pilotfish.retrieval import Index
from pilotfish.retrieval.errors import DamagedIndex, LockedIndex, NewerFormat, RetrievalError
from pilotfish.retrieval.store import files

EVERYWHERE: dict[str, Any] = {  # all lists are read: what is there is found
    "xtr": {"probes": 1 << 20},
    "hybrid": {"settings": {"xtr": {"probes": 1 << 20}}},
}
CHILD = Path(__file__).with_name("crash_child.py")


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
    try:
        for _ in range(kills):
            command = [sys.executable, str(CHILD), str(folder), str(rng.randrange(1 << 30)), str(number)]
            lines = killed(command, rng.uniform(0.0, 0.6))
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
        ended.set()
        for thread in readers:
            thread.join()
    assert not errors, errors[0]
    return changes


def killed(command: list[str], after: float) -> list[str]:
    """What a process says until it is killed, ``after`` seconds behind its first line."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline()]
    timer = threading.Timer(after, child.send_signal, [signal.SIGKILL])
    timer.start()
    lines += child.stdout.readlines()
    child.wait()
    timer.join()
    return [line for line in lines if line.endswith("\n")]


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

    monkeypatch.setattr(files.os, "fsync", full)
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
