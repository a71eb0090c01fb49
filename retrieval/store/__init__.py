"""Crash-safe storage of the documents and arrays of an index; see `store`."""

from .store import Change, Segment, Snapshot, Store, Writer

__all__ = ["Change", "Segment", "Snapshot", "Store", "Writer"]
