"""Tests of users who may not write an index, or not read it, and of the permissions of its files."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pilotfish.retrieval import Index
from pilotfish.retrieval.errors import AccessDenied, LockedIndex

NOBODY = 65_534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs to change the user")

# Reads as a user without permissions. Modules are imported before, since perhaps only root may read their folder.
READER = """
import os, sys, tempfile
from pilotfish.retrieval import Index
with tempfile.TemporaryDirectory() as warm, Index.create(warm, "bm25") as index:
    index.add([{"id": "a", "text": "a"}, {"id": "b", "text": "b"}])
    Index.open(warm).delete(["a"])
folder = sys.argv[1]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
opened = None
for line in sys.stdin:
    try:
        opened = opened if line == "again\\n" else Index.open(folder)
        print(len(opened), opened.get("new") is not None, sorted(opened.ids()), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""
WRITER = """
import sys
from pilotfish.retrieval import Index
index = Index.open(sys.argv[1])
index.add([{"id": "new", "text": "new text"}])
print("written", flush=True)
sys.stdin.readline()
"""


class Child:
    """A process that answers lines."""

    def __init__(self, code: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str = "open") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    with Index.create(tmp_path / "index", "bm25") as index:
        index.add([{"id": "a", "text": "some text"}, {"id": "b", "text": "more text"}])
    return tmp_path / "index"


def test_a_reader_without_write_permission_sees_the_last_commit(folder: Path) -> None:
    reader = Child(READER, folder)
    assert reader.ask() == "2 False ['a', 'b']"  # no writer
    writer = Child(WRITER, folder)
    assert writer.process.stdout is not None
    assert writer.process.stdout.readline() == "written\n"
    after = "3 True ['a', 'b', 'new']"
    assert reader.ask("again") == after  # the same index object, while a writer is open
    assert reader.ask() == after
    writer.process.send_signal(signal.SIGKILL)
    writer.process.wait()
    assert (folder / "documents.db-wal").stat().st_size > 0
    assert reader.ask("again") == after
    assert reader.ask() == after  # the write-ahead log of a killed writer
    with Index.open(folder) as index:
        index.delete(["a"])
    assert reader.ask("again") == reader.ask() == "2 True ['b', 'new']"


def test_a_write_ahead_log_that_cannot_be_read_is_reported(folder: Path) -> None:
    writer = Child(WRITER, folder)
    assert writer.process.stdout is not None
    assert writer.process.stdout.readline() == "written\n"
    writer.process.kill()
    writer.process.wait()
    (folder / "documents.db-shm").unlink()  # as after a copy of some of the files
    answer = Child(READER, folder).ask()
    assert answer.startswith("3 True") or (answer.startswith("AccessDenied") and "index check" in answer)


@pytest.mark.parametrize("name", ["CURRENT", "manifest-*.json", "documents.db", "segment-0-*", "live-*"])
def test_a_file_without_read_permission_is_not_called_damaged(folder: Path, name: str) -> None:
    path = next(folder.glob(name))
    path.chmod(0o600)
    assert Child(READER, folder).ask() == (
        f"AccessDenied {folder}: {path.name} may not be read (permission denied); ask the owner of the index"
    )


def test_an_index_without_write_permission_is_not_changed(folder: Path) -> None:
    code = READER.replace('opened.get("new") is not None', 'opened.delete(["a"])')
    answer = Child(code, folder).ask()
    assert answer.startswith(LockedIndex.__name__) and "may not be written" in answer
    assert issubclass(AccessDenied, ValueError)


@pytest.mark.parametrize("first", [0o000, 0o002, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("later", [0o000, 0o077])
def test_all_files_have_the_permissions_of_the_folder(tmp_path: Path, first: int, later: int) -> None:
    before = os.umask(first)
    try:
        with Index.create(tmp_path / "index", "bm25") as index:
            index.add([{"id": "a", "text": "some text"}])
            os.umask(later)
            index.add([{"id": "b", "text": "more text"}])
            index.delete(["a"])
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "index").iterdir()}
    finally:
        os.umask(before)
    assert {"CURRENT", "documents.db", "documents.db-wal", "documents.db-shm", "write.lock"} <= set(modes)
    assert set(modes.values()) == {0o666 & ~first}
