"""What an index consists of at one moment: an immutable file, and one that names the latest.

``CURRENT`` holds the name of a ``manifest-N.json``. A commit writes new files, then a new manifest, then replaces
``CURRENT``: whoever opens the index finds it as it was before or as it is after.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pilotfish._internal import atomic_write

from ..errors import DamagedIndex, NewerFormat, NoIndex

FORMAT = 1
CURRENT = "CURRENT"
SHARDS = "shards.json"  # what a folder of shards holds in its place, see `retrieval.shards`


@dataclass(frozen=True)
class ArrayFile:
    """An array on disk.

    Attributes:
        name: Of its file, within the index.
        bytes: Size of the file.
        sha256: Of the file.
        form: Type and shape of the array.
    """

    name: str
    bytes: int
    sha256: str
    form: str = ""


@dataclass(frozen=True)
class SegmentFiles:
    """A segment: documents that were added together, or merged.

    Attributes:
        number: Its number; none is used twice.
        documents: How many it was made of.
        rows: Its postings, tokens of an XTR index.
        arrays: Its files by name.
    """

    number: int
    documents: int
    rows: int
    arrays: dict[str, ArrayFile]


@dataclass(frozen=True)
class Manifest:
    """An index at one moment.

    Attributes:
        number: Grows with each commit.
        kind: Of the index, as plugins register it.
        options: Of that kind.
        encoder: Which encoder, and the fingerprint of its files.
        identity: Of the index, drawn when it was made: another one in its place is told apart.
        settings: How it is searched; may change.
        shared: Arrays that all segments need.
        segments: In the order of their making.
        live: A bit for each internal number of a document: it was not deleted.
        next_document: Internal numbers are below; none is used twice.
        next_segment: Likewise.
        count: Documents that can be found.
    """

    number: int
    kind: str
    options: dict[str, Any]
    encoder: dict[str, Any]
    identity: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, ArrayFile] = field(default_factory=dict)
    segments: tuple[SegmentFiles, ...] = ()
    live: ArrayFile | None = None
    next_document: int = 0
    next_segment: int = 0
    count: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return f"manifest-{self.number}.json"

    def files(self) -> dict[str, ArrayFile]:
        """All files that it needs, by name."""
        found = [*self.shared.values(), *(f for s in self.segments for f in s.arrays.values())]
        return {f.name: f for f in [*found, *([self.live] if self.live else [])]}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest and make it the current one.

    Raises:
        OSError: nothing has changed.
    """
    body = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**body, "sha256": _checksum(body)}, indent=1, sort_keys=True) + "\n"
    atomic_write.write_bytes(folder / manifest.name, text.encode())
    atomic_write.write_bytes(folder / CURRENT, f"{manifest.name}\n".encode())


def current_manifest(folder: Path) -> str:
    """Name of the current manifest.

    Raises:
        NoIndex: there is none.
        DamagedIndex: what is there is no such name.
    """
    try:
        name = (folder / CURRENT).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise NoIndex(f"{folder}: there is no index; make one with `pilotfish index build`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedIndex(
            f"{folder}: {CURRENT} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    number = name.removeprefix("manifest-").removesuffix(".json")
    if name != f"manifest-{number}.json" or not (number.isascii() and number.isdigit()):
        raise DamagedIndex(f"{folder}: {CURRENT} names no manifest")
    return name


def read_manifest(folder: Path, name: str) -> Manifest:
    """A manifest.

    Raises:
        DamagedIndex: it is missing or not what was written.
        NewerFormat: a later version wrote it.
    """
    try:
        body = json.loads((folder / name).read_text(encoding="utf-8"))
        checksum, version = body.pop("sha256"), body["format"]
    except FileNotFoundError:
        raise DamagedIndex(f"{folder}: {name} is missing") from None
    except OSError as error:
        raise DamagedIndex(f"{folder}: {name} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedIndex(f"{folder}: {name} is damaged") from None
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(f"{folder}: written in format {version}, this Pilotfish reads up to {FORMAT}; upgrade it")
    if checksum != _checksum(body):
        raise DamagedIndex(f"{folder}: {name} is damaged")
    body.pop("format")
    arrays = {name: ArrayFile(**f) for name, f in body.pop("shared").items()}
    segments = tuple(
        SegmentFiles(s["number"], s["documents"], s["rows"], {n: ArrayFile(**f) for n, f in s["arrays"].items()})
        for s in body.pop("segments")
    )
    live = body.pop("live")
    return Manifest(**body, shared=arrays, segments=segments, live=None if live is None else ArrayFile(**live))


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
