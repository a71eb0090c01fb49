"""Synchronization: makes the passages of an index those of the files in folders."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .errors import RetrievalError
from .store.documents import Document

if TYPE_CHECKING:
    from .loaders import DocumentSource


@dataclass(frozen=True)
class SyncReport:
    """Changes of a synchronization.

    Attributes:
        added: Names of the files that were not in the index.
        changed: Names of the files with other contents, or other settings of chunks, than those in the index.
        removed: Names of the files in the index that no longer exist.
        unchanged: Number of the other files.
        skipped: Reason for each file that was left out, wholly or in part, by name. If a file cannot be read, the
            passages of its earlier version stay; so do those of all files in a folder that cannot be read.
        documents_added: Number of documents (passages, records) of the files added or changed.
        documents_removed: Number of documents that were removed, with those of earlier versions.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    documents_added: int = 0
    documents_removed: int = 0

    def __bool__(self) -> bool:
        """Return whether the index changes."""
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        """Return the numbers of the report as one line."""
        return (
            f"files: {len(self.added)} added, {len(self.changed)} changed, {len(self.removed)} removed, "
            f"{self.unchanged} unchanged; documents: {self.documents_added} added, {self.documents_removed} removed"
        )


@dataclass(frozen=True)
class SyncPlan:
    """What a synchronization will change: the documents to add, and the files whose earlier documents go."""

    report: SyncReport
    documents: list[Document]
    outdated: list[str]

    def with_removed(self, count: int) -> "SyncPlan":
        """Return the plan with the number of documents to remove in its report."""
        return replace(self, report=replace(self.report, documents_removed=count))


def plan_sync(known: Mapping[str, str], source: "DocumentSource") -> SyncPlan:
    """Compare files with those in an index, and read the files that differ.

    Args:
        known: Digest of each file in the index, by name (`DocumentFilter.digests`).
        source: Files that the index is to contain.

    Raises:
        RetrievalError: A file cannot be read and ``source`` does not skip bad files, or two documents have the same id.
    """
    added, changed, documents = [], [], list[Document]()
    unreadable_folders = tuple(name for name in source.skipped if name.endswith("/"))
    missing = {n for n in known if n not in source.skipped and not n.startswith(unreadable_folders)}
    unchanged = 0
    for path, name in source.files:
        missing.discard(name)
        if path is not None and name in known and source.has_digest(path, name, known[name]):
            unchanged += 1
            continue
        read = source.read(path, name)
        if read is None:
            continue
        new = list(read)
        documents += new
        if name in known:
            changed.append(name)
        elif new:
            added.append(name)
    sources: dict[str, str | None] = {}
    for document in documents:
        if document.id in sources:
            places = " and ".join(dict.fromkeys(str(s) for s in (sources[document.id], document.source)))
            raise RetrievalError(f"document {document.id!r} comes twice, from {places}; give each document a unique id")
        sources[document.id] = document.source
    removed = sorted(missing)
    report = SyncReport(added, changed, removed, unchanged, source.skipped, len(documents))
    return SyncPlan(report, documents, [*changed, *removed])
