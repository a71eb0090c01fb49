"""A process that changes an index in an endless loop and reports its commits, until `test_store` kills it.

For each line of stdin (folder, seed, first document number) the process forks a writer. All modules are imported once,
before the fork: otherwise most of the time of 200 kills would be spent on imports.
"""

import json
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
        present = [name for name in index.ids() if not name.startswith("f")]
        step = rng.random()
        if step < 0.25:
            number = _change_files(Path(f"{folder}.files"), rng, number)
            _say("sync", [json.loads(line)["id"] for line in _lines(Path(f"{folder}.files"))])
            index.sync([f"{folder}.files"])
        elif step < 0.6 or len(present) < 4:
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


def _change_files(folder: Path, rng: random.Random, number: int) -> int:
    """Write a new file, and rewrite or delete another; return the next document number."""
    folder.mkdir(exist_ok=True)
    files = sorted(folder.glob("*.jsonl"))
    if len(files) > 3:
        files[0].unlink()
    for path in [folder / f"{number}.jsonl", *rng.sample(files[1:], min(1, len(files[1:])))]:
        records = [{"id": f"f{number + i}", "text": f"wordf{number + i} in text"} for i in range(rng.randrange(1, 4))]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        number += len(records)
    return number


def _lines(folder: Path) -> list[str]:
    return [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def _warm(index: Index) -> None:
    """Run each operation once on another index, so that kernels are compiled before the kill timer starts."""
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
