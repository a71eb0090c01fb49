"""Crash-safe storage of the documents and arrays of an index; see `store`."""

from .store import Change, Segment, Snapshot, Store, Writer, check_new_folder

__all__ = ["Change", "Segment", "Snapshot", "Store", "Writer", "check_new_folder"]
