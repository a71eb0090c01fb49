"""Text files: compression by their name, and encoding by byte order mark, declaration, UTF-8, or detection."""

import codecs
import gzip
import io
import sys
from pathlib import Path
from typing import IO

from .errors import RetrievalError

# The marks of UTF-32 come first, since that of UTF-16 is the beginning of one.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Browsers decode pages that declare one of these encodings with a superset of it (WHATWG Encoding Standard, 4.2).
SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "gb2312": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
WESTERN = "cp1252"
SAMPLE = 1 << 18  # bytes from which the encoding of a file that is not UTF-8 is detected


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case; that of the uncompressed file if the name ends in ``.gz``."""
    return Path(name.lower().removesuffix(".gz")).suffix


def open_binary(path: Path, name: str) -> IO[bytes]:
    """Open a file, which is decompressed if its name ends in ``.gz``."""
    return gzip.open(path) if name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def open_text(path: Path | None, name: str, encoding: str | None = None) -> IO[str]:
    """Open a text file, or standard input if ``path`` is None.

    Args:
        path: Path of the file.
        name: Name of the file; see `open_binary`.
        encoding: Encoding of the file; None for UTF-8 or that of the byte order mark, as JSON requires.
    """
    if path is None:
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
    encoding = encoding or marked_encoding(path, name) or "utf-8"
    return io.TextIOWrapper(open_binary(path, name), encoding=encoding, newline="")


def marked_encoding(path: Path, name: str) -> str | None:
    """Return the encoding that the byte order mark of a file names; None without a mark.

    Raises:
        OSError: The file cannot be read; `EOFError` and `zlib.error` for a damaged compressed file.
    """
    with open_binary(path, name) as file:
        head = file.read(4)
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), None)


def detect_encoding(path: Path, name: str, declared: str | None = None) -> str:
    """Return the encoding of a text file, as a codec of Python.

    Args:
        path: Path of the file.
        name: Name of the file, for messages; see `open_binary`.
        declared: Encoding that the file declares, which is used if the whole file can be decoded with it.

    Raises:
        RetrievalError: The file is not text in an encoding that can be recognised.
        OSError: The file cannot be read; `EOFError` and `zlib.error` for a damaged compressed file.
    """
    for encoding in (marked_encoding(path, name), *_declared_codecs(declared), "utf-8"):
        if encoding is not None and _decodes(path, name, encoding):
            return encoding
    from charset_normalizer import from_bytes

    with open_binary(path, name) as file:
        guesses = from_bytes(file.read(SAMPLE))
    best = guesses.best()
    if best is not None:
        # Short texts fit several code pages equally well; among these the Western European one is the most common.
        equal = [g for g in guesses if (g.chaos, g.coherence) == (best.chaos, best.coherence)]
        western = any(WESTERN in g.could_be_from_charset for g in equal)
        for encoding in (WESTERN if western else None, best.encoding):
            if encoding is not None and _decodes(path, name, encoding):
                return encoding
    raise RetrievalError(f"{name}: not text in an encoding that can be recognised; convert it to UTF-8")


def _declared_codecs(declared: str | None) -> list[str]:
    """Return the codecs to try for a declared encoding; none for UTF-16 and UTF-32, which only a mark can declare."""
    try:
        codec = codecs.lookup(declared or "")
    except LookupError:
        return []
    name = codec.name
    if not getattr(codec, "_is_text_encoding", True):  # Python has codecs like "zlib", which are no encodings of text
        return []
    return [] if name.startswith(("utf-16", "utf-32")) else [SUPERSETS.get(name, name), name]


def _decodes(path: Path, name: str, encoding: str) -> bool:
    """Return whether a whole file can be decoded."""
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
        with open_binary(path, name) as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except (LookupError, UnicodeError):
        return False
    return True
