"""What can be wrong with an index; every message is one line that says what to do."""


class RetrievalError(ValueError):
    """A wrong request, or an index that cannot serve it."""


class NoIndex(RetrievalError):  # noqa: N818 -- the name says it
    """There is no index in the folder."""


class DamagedIndex(RetrievalError):  # noqa: N818
    """A file of the index is missing, cut short, or not what was written."""


class LockedIndex(RetrievalError):  # noqa: N818
    """Somebody else writes to the index."""


class NewerFormat(RetrievalError):  # noqa: N818
    """The index was written by a later version of Pilotfish."""


def first_line(error: BaseException) -> str:
    """Of what an error says; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
