"""Changes an index for ever, and says what it has committed; killed by `test_crashes`."""

import random
import sys
import tempfile
from pathlib import Path

import words

from pilotfish.retrieval import Index


def main() -> None:
    words.use()
    index = Index.open(sys.argv[1])
    _warm(index)
    rng = random.Random(int(sys.argv[2]))
    number = int(sys.argv[3])
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
