"""Changes an index for ever, and says what it has committed; killed by `test_store`.

Each line of stdin (folder, seed, first number) forks such a writer off a process that has imported everything once:
200 kills would otherwise spend their time on imports.
"""

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import words

from pilotfish.retrieval import Index


def main() -> None:
    words.use()
    for line in sys.stdin:
        folder, seed, number = line.split()
        child = os.fork()
        if child == 0:
            _write(folder, random.Random(int(seed)), int(number))
        os.waitpid(child, 0)
        _say("killed", [])


def _write(folder: str, rng: random.Random, number: int) -> NoReturn:
    index = Index.open(folder)
    _warm(index)
    _say("writer", [str(os.getpid())])
    while True:
        present = list(index.ids())
        step = rng.random()
        if step < 0.55 or len(present) < 4:
            new = [f"d{number + i}" for i in range(rng.randrange(1, 6))]
            number += len(new)
            _say("add", new)
            index.add([{"id": n, "text": f"word{n} in text"} for n in new])
        elif step < 0.9:
            gone = rng.sample(present, min(3, len(present)))
            _say("delete", gone)
            index.delete(gone)
        else:
            _say("compact", [])
            index.compact()
        _say("done", [])


def _warm(index: Index) -> None:
    """Do all of it elsewhere once: kernels are compiled and loaded before the clock runs."""
    about = index.snapshot.manifest
    with (
        tempfile.TemporaryDirectory() as folder,
        Index.create(Path(folder) / "x", about.kind, about.encoder["name"], about.options) as other,
    ):
        other.add([{"id": str(i), "text": f"word{i}"} for i in range(6)])
        other.delete(["1"])
        other.compact()
        other.search("word2")


def _say(what: str, names: list[str]) -> None:
    sys.stdout.write(" ".join([what, *names]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
