"""Manifests: immutable files that list the files of an index at one commit.

``CURRENT`` contains the name of the latest ``manifest-N.json``. A commit writes new files, then a new manifest, and
then replaces ``CURRENT`` atomically, so a reader opens the index in the state before or after the commit.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pilotfish._internal import atomic_write

from ..errors import DamagedIndex, NewerFormat, NoIndex, OlderFormat, RetrievalError, read_errors

FORMAT = 2  # 2: documents have a source, and their metadata keep their order
CURRENT = "CURRENT"
SHARDS = "shards.json"  # file of a sharded index instead of ``CURRENT``, see `retrieval.shards`


@dataclass(frozen=True)
class ArrayFile:
    """Array file of an index.

    Attributes:
        name: Name of the file in the folder of the index.
        bytes: Size of the file in bytes.
        sha256: SHA-256 of the file, as hex digits.
        form: Dtype and shape of the array.
    """

    name: str
    bytes: int
    sha256: str
    form: str = ""


@dataclass(frozen=True)
class SegmentFiles:
    """Files of a segment: documents that were added together or merged.

    Attributes:
        number: Number of the segment; never reused.
        documents: Number of documents when the segment was written.
        rows: Number of postings (tokens of an XTR index).
        arrays: Array files by array name.
    """

    number: int
    documents: int
    rows: int
    arrays: dict[str, ArrayFile]


@dataclass(frozen=True)
class Manifest:
    """State of an index at one commit.

    Attributes:
        number: Number of the commit; grows with each commit.
        kind: Registered name of the index type.
        options: Options of the index type.
        encoder: Name, fingerprint and dimension of the encoder.
        identity: Random identity of the index, by which another index in the same folder is detected.
        settings: Search settings that were set with `Index.configure`.
        shared: Files of the shared arrays: trained quantiser state that all segments need.
        segments: Segments in the order in which they were written.
        live: File of the bitmap of live documents, by internal doc id; None before the first commit.
        next_document: Next internal doc id; doc ids are never reused.
        next_segment: Next segment number; segment numbers are never reused.
        count: Number of documents, without deleted ones.
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
        """Name of the file of the manifest."""
        return f"manifest-{self.number}.json"

    def files(self) -> dict[str, ArrayFile]:
        """Return all array files of the manifest by file name."""
        files = [*self.shared.values(), *(f for s in self.segments for f in s.arrays.values())]
        return {f.name: f for f in [*files, *([self.live] if self.live else [])]}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest and make it the current one.

    Raises:
        OSError: The manifest cannot be written; the index is unchanged.
    """
    body = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**body, "sha256": _checksum(body)}, indent=1, sort_keys=True) + "\n"
    mode = atomic_write.file_mode(folder)
    atomic_write.write_bytes(folder / manifest.name, text.encode(), mode)
    atomic_write.write_bytes(folder / CURRENT, f"{manifest.name}\n".encode(), mode)


def current_manifest(folder: Path) -> str:
    """Return the file name of the current manifest.

    Raises:
        NoIndex: The folder contains no index.
        DamagedIndex: ``CURRENT`` cannot be read, or does not contain the name of a manifest.
    """
    try:
        with read_errors(folder / CURRENT, missing=False):
            name = (folder / CURRENT).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise NoIndex(f"{folder}: there is no index; make one with `pilotfish index build`") from None
    except UnicodeDecodeError as error:
        raise DamagedIndex(f"{folder}: {CURRENT} cannot be read ({error})") from None
    number = name.removeprefix("manifest-").removesuffix(".json")
    if name != f"manifest-{number}.json" or not (number.isascii() and number.isdigit()):
        raise DamagedIndex(f"{folder}: {CURRENT} does not name a manifest")
    return name


def read_manifest(folder: Path, name: str) -> Manifest:
    """Read a manifest.

    Raises:
        DamagedIndex: The manifest is missing, or differs from what was written.
        NewerFormat: The manifest was written by a later version of Pilotfish.
    """
    try:
        with read_errors(folder / name):
            body = json.loads((folder / name).read_text(encoding="utf-8"))
        checksum, version = body.pop("sha256"), body["format"]
    except RetrievalError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedIndex(f"{folder}: {name} is damaged") from None
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(
            f"{folder}: written in format {version}, this Pilotfish reads up to {FORMAT}; update Pilotfish"
        )
    if isinstance(version, int) and version < FORMAT:
        raise OlderFormat(
            f"{folder}: written in format {version} by an earlier version of Pilotfish; this one reads format "
            f"{FORMAT}: build the index again"
        )
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
