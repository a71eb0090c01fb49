"""Errors of the retrieval stack; every message is one line that names the remedy."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

NOT_FINITE = "the encoder returned NaN or infinite values; check its checkpoint, or use --precision float32"


class RetrievalError(ValueError):
    """Invalid request, or an index that cannot serve it."""


class NoIndex(RetrievalError):  # noqa: N818 -- the name says it
    """Error for a folder that contains no index."""


class DamagedIndex(RetrievalError):  # noqa: N818
    """Error for a file of the index that is missing, truncated or different from what was written."""


class AccessDenied(RetrievalError):  # noqa: N818
    """Error for a file of the index that the user may not read."""


class LockedIndex(RetrievalError):  # noqa: N818
    """Error for an index that another process is writing to, or that is not writable."""


class NewerFormat(RetrievalError):  # noqa: N818
    """Error for an index that was written by a later version of Pilotfish."""


class OlderFormat(RetrievalError):  # noqa: N818
    """Error for an index that was written by an earlier version of Pilotfish and has to be built again."""


@contextlib.contextmanager
def read_errors(path: Path, missing: bool = True) -> Iterator[None]:
    """Convert errors of opening or reading a file of an index; those of a missing file only if ``missing``.

    Raises:
        AccessDenied: The user may not read the file.
        DamagedIndex: The file is missing, or cannot be read for another reason.
    """
    try:
        yield
    except PermissionError:
        raise AccessDenied(
            f"{path.parent}: {path.name} may not be read (permission denied); ask the owner of the index"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        if not missing:
            raise
        raise DamagedIndex(f"{path.parent}: {path.name} is missing") from None
    except OSError as error:
        raise DamagedIndex(f"{path.parent}: {path.name} cannot be read ({error.strerror or error})") from None


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
