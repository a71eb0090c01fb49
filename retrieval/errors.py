"""Errors of the retrieval stack; every message is one line that names the remedy."""

from importlib.util import find_spec

NOT_FINITE = "the encoder returned NaN or infinite values; check its checkpoint, or use --precision float32"


class RetrievalError(ValueError):
    """Invalid request, or an index that cannot serve it."""


class NoIndex(RetrievalError):  # noqa: N818 -- the name says it
    """Error for a folder that contains no index."""


class DamagedIndex(RetrievalError):  # noqa: N818
    """Error for a file of the index that is missing, truncated or different from what was written."""


class LockedIndex(RetrievalError):  # noqa: N818
    """Error for an index that another process is writing to, or that is not writable."""


class NewerFormat(RetrievalError):  # noqa: N818
    """Error for an index that was written by a later version of Pilotfish."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require_module(module: str, what: str, package: str | None = None) -> None:
    """Check that an optional module is installed.

    Args:
        module: Name of the module.
        what: What needs it, for the message.
        package: Name of its package, if it differs from that of the module.

    Raises:
        RetrievalError: The module is not installed.
    """
    if find_spec(module) is None:
        raise RetrievalError(f"{what} needs {package or module}; pip install pilotfish[retrieval]")
