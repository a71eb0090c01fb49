"""Tests of concurrent writers: threads queue, other processes wait for a limited time, forks hold no lock."""

import asyncio
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pilotfish.retrieval import Index
from pilotfish.retrieval.errors import LockedIndex

HOLDER = """
import sys, time
from pathlib import Path
from pilotfish.retrieval.store.lock import write_lock
with write_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Return a function that holds the lock of a folder in another process until a line is written to it."""
    processes = []

    def start(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            stream.close()


def test_twenty_threads_with_indexes_of_their_own_all_commit(create, tmp_path: Path) -> None:
    create().add([{"id": "first", "text": "first"}])

    def add(i: int) -> int:
        with Index.open(tmp_path / "index") as index:
            return index.add([{"id": str(i), "text": f"word{i} in text"}])

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(add, range(20))) == 20
    opened = Index.open(tmp_path / "index")
    assert set(opened.ids()) == {"first", *map(str, range(20))}
    opened.check()


async def test_twenty_tasks_all_commit(create) -> None:
    index = create()
    await asyncio.gather(*(asyncio.to_thread(index.upsert, [{"id": str(i), "text": f"word{i}"}]) for i in range(20)))
    assert len(index) == 20


def test_a_change_waits_for_another_process(create, tmp_path: Path, hold) -> None:
    index = create()
    process = hold(tmp_path / "index")
    threading.Timer(0.5, process.kill).start()
    started = time.monotonic()
    assert index.add([{"id": "a", "text": "a"}]) == 1
    assert time.monotonic() - started > 0.4


def test_the_message_names_the_process_that_holds_the_lock(create, tmp_path: Path, hold) -> None:
    create().close()
    process = hold(tmp_path / "index")
    index = Index.open(tmp_path / "index", lock_timeout=0.2)
    with pytest.raises(LockedIndex, match=rf"process {process.pid} writes to this index, waited for 0.2 s"):
        index.add([{"id": "a", "text": "a"}])
    process.kill()
    process.wait()
    assert index.add([{"id": "a", "text": "a"}]) == 1, "the lock ends with its process"


def test_command_waits_for_the_lock_timeout(create, tmp_path: Path, hold, inside) -> None:
    index = create()
    index.add([{"id": "a", "text": "a"}])
    process = hold(tmp_path / "index")
    result = inside("index", "delete", str(tmp_path / "index"), "a", "--lock-timeout", "0.1")
    assert (result.returncode, f"process {process.pid} writes to this index" in result.stderr) == (2, True)
    assert "a" in index


def test_a_callback_may_not_change_the_index_again(create) -> None:
    index = create()
    with pytest.raises(LockedIndex, match="in this thread"):
        index.add([{"id": "a", "text": "a"}], progress=lambda *_: index.delete(["a"]) and None)
    assert index.add([{"id": "a", "text": "a"}]) == 1


def test_a_forked_process_does_not_wait_for_threads_of_its_parent(create) -> None:
    index = create()
    with index._store.writer():
        child = os.fork()
        if child == 0:
            from pilotfish.retrieval.store import lock

            os._exit(int(lock._queue(index.folder)._lock.locked()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def count_and_search(index: Index) -> tuple[int, str]:
    import words

    words.use()
    return len(index), index.search("word3", 1)[0].id


def test_an_index_is_pickled_by_its_folder(create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create(dimension=0).add([{"id": str(i), "text": f"word{i}"} for i in range(5)])
    opened = Index.open("index", lock_timeout=5)
    copy = pickle.loads(pickle.dumps(opened))
    assert (copy.folder, copy._store.lock_timeout) == (tmp_path / "index", 5)
    assert count_and_search(copy) == (5, "3")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(count_and_search, (opened,)) == (5, "3")
