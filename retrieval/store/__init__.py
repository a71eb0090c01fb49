"""Documents and arrays on disk that survive any crash; see `store`."""

from .store import Change, Segment, Snapshot, Store, Writer

__all__ = ["Change", "Segment", "Snapshot", "Store", "Writer"]
