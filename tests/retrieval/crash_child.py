"""Changes an index for ever, and says what it has committed; killed by `test_crashes`."""

import random
import sys

import words

from pilotfish.retrieval import Index


def main() -> None:
    words.use()
    index = Index.open(sys.argv[1])
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


def _say(what: str, names: list[str]) -> None:
    sys.stdout.write(" ".join([what, *names]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
