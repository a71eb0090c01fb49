"""Records of CSV files: the delimiter is found, and each column has one type."""

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from .errors import RetrievalError

LONGEST_FIELD = 1 << 27  # maximum number of characters of a field
DELIMITERS = (",", ";", "\t", "|")
SNIFFED = 50  # rows from which the delimiter is found
INTEGER = re.compile(r"-?(0|[1-9]\d{0,18})", re.ASCII)  # "007" is a code and "+49" belongs to a telephone number
NUMBER = re.compile(r"-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
MISSING = ("", "nan", "na", "n/a", "null", "none")  # in columns of numbers


def read_csv(
    open_file: Callable[[], IO[str]], name: str, delimiter: str, text_columns: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterate over the records of a CSV file, as (record number from 1 on, record).

    A column contains numbers if each of its fields is empty or a number; otherwise all of its fields are text, also
    those that look like numbers. The file is read twice, so that memory does not depend on its size.

    Args:
        open_file: Function that opens the file from its beginning, with ``newline=""``.
        name: Name of the file, for messages.
        delimiter: Delimiter that is used if none can be found.
        text_columns: Columns that are text in any case.

    Raises:
        RetrievalError: A record has more fields than the header, or is not CSV.
    """
    csv.field_size_limit(LONGEST_FIELD)
    with open_file() as file:
        delimiter = find_delimiter(list(itertools.islice(file, SNIFFED)), delimiter)
    types: dict[str, Callable[[str], Any]] = {}
    for _, row in _rows(open_file, name, delimiter):
        for column, field in row.items():
            types[column] = _widest(types.get(column), field)
    for number, row in _rows(open_file, name, delimiter):
        yield (
            number,
            {
                column: field if column in text_columns else _convert(types[column], field)
                for column, field in row.items()
                if column
            },
        )


def find_delimiter(lines: list[str], default: str) -> str:
    """Return the delimiter that splits all rows into the largest equal number of fields.

    `csv.Sniffer` is not used: it takes letters of the text for delimiters.

    Args:
        lines: First lines of the file; the last row may be incomplete.
        default: Delimiter that is returned if none splits the rows.
    """
    widths: dict[str, int] = {}
    for delimiter in sorted(DELIMITERS, key=lambda d: d != default):
        try:
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            continue
        complete = rows[:-1] if len(rows) > 2 else rows
        if complete and len({len(row) for row in complete}) == 1:
            widths[delimiter] = len(complete[0])
    best = max(widths, key=lambda d: widths[d], default=default)
    return best if widths.get(best, 0) > 1 else default


def _rows(open_file: Callable[[], IO[str]], name: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    number = 0
    try:
        with open_file() as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for number, row in enumerate(reader, 1):
                if None in row:
                    raise RetrievalError(f"{name}, record {number}: more fields than the header")
                yield number, {column: field or "" for column, field in row.items()}
    except csv.Error as error:
        raise RetrievalError(f"{name}, record {number + 1}: {error}") from None


def _widest(known: Callable[[str], Any] | None, field: str) -> Callable[[str], Any]:
    """Return the type of a column, `int`, `float` or `str`, after one more field."""
    if known is str:
        return str
    field = field.strip()
    if field.lower() in MISSING:
        return known or int
    if INTEGER.fullmatch(field):
        return known or int
    digits = field.partition(".")[0]
    exact = "e" in field.lower() or len(digits) < 16  # longer ones are identifiers, which a float would round
    return float if exact and NUMBER.fullmatch(field) and math.isfinite(float(field)) else str


def _convert(kind: Callable[[str], Any], field: str) -> Any:
    """Convert a field to the type of its column; None if it is missing."""
    if kind is str:
        return field or None
    return None if field.strip().lower() in MISSING else kind(field)
