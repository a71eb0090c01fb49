"""Texts of files: plain text, Markdown, HTML and PDF."""

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import RetrievalError, first_line, require_module
from .text_encoding import detect_encoding, open_binary, open_text, suffix_of

TEXTS = (".txt", ".text", ".md", ".markdown", ".html", ".htm", ".pdf", ".rst")


def read_texts(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over (text, metadata) of the parts of a file that are chunked separately, such as pages.

    Args:
        path: Path of the file.
        name: Name of the file, whose suffix is its format.

    Raises:
        RetrievalError: The file cannot be read.
    """
    if suffix_of(name) == ".pdf":
        yield from _pdf(path, name)
        return
    is_html = suffix_of(name) in (".html", ".htm")
    try:
        declared = _declared_encoding(path, name) if is_html else None
        with open_text(path, name, detect_encoding(path, name, declared)) as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise RetrievalError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if suffix_of(name) in (".md", ".markdown"):
        require_module("markdown_it", ".md", "markdown-it-py")
        from markdown_it import MarkdownIt

        text = _html(name, MarkdownIt().render(text))
    elif is_html:
        text = _html(name, text)
    yield text, {}


def _declared_encoding(path: Path, name: str) -> str | None:
    """Return the encoding that an HTML page or XML file declares."""
    require_module("bs4", ".html and .md", "beautifulsoup4")
    from bs4.dammit import EncodingDetector

    with open_binary(path, name) as file:
        return EncodingDetector.find_declared_encoding(file.read(4096), is_html=True)


def _html(name: str, text: str) -> str:
    """Return the visible text of an HTML page, one block per line.

    Raises:
        RetrievalError: The page cannot be parsed.
    """
    require_module("bs4", ".html and .md", "beautifulsoup4")
    from bs4 import BeautifulSoup

    try:
        page = BeautifulSoup(text, "html.parser")
    except Exception as error:  # parsers raise many types of errors for invalid HTML
        raise RetrievalError(f"{name}: cannot be read as HTML ({first_line(error)})") from None
    for hidden in page(["script", "style", "noscript", "template"]):
        hidden.decompose()
    return "\n".join(" ".join(line.split()) for line in page.get_text("\n").splitlines() if line.strip())


def _pdf(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    require_module("pypdf", ".pdf")
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings name no file
    try:
        for number, page in enumerate(pypdf.PdfReader(path).pages, 1):
            # PDF files can contain halves of surrogate pairs, which are no characters.
            text = page.extract_text().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text, {"page": number}
    except pypdf.errors.FileNotDecryptedError:
        raise RetrievalError(f"{name}: encrypted, a password is needed") from None
    except Exception as error:  # pypdf raises many types of errors for damaged files
        raise RetrievalError(f"{name}: cannot be read as PDF ({first_line(error)})") from None
