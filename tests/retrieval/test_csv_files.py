"""Tests of CSV files: delimiters, and one type per column."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.retrieval.csv_files import find_delimiter, read_csv
from pilotfish.retrieval.loaders import DocumentSource


def column(*fields: str) -> list[Any]:
    """Return the values of a column."""
    file = io.StringIO()
    csv.writer(file).writerows([("id", "x"), *((str(i), field) for i, field in enumerate(fields))])
    return [row["x"] for _, row in read_csv(lambda: io.StringIO(file.getvalue(), newline=""), "a.csv", ",", ("id",))]


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        (("1.5", "1.50", "2"), [1.5, 1.5, 2.0]),
        (("1", "2", ""), [1, 2, None]),
        (("1", "x"), ["1", "x"]),
        (("007", "8"), ["007", "8"]),
        (("-3", "0"), [-3, 0]),
        (("1e3", ".5", "2."), [1000.0, 0.5, 2.0]),
        (("1e999", "1"), ["1e999", "1"]),
        (("NaN", "1", "null"), [None, 1, None]),
        (("", ""), [None, None]),
        (("+4989123", "1"), ["+4989123", "1"]),
        (("12345678901234567890", "1"), ["12345678901234567890", "1"]),
        (("1,5", "2,5"), ["1,5", "2,5"]),
        (("1_000", "2"), ["1_000", "2"]),
        (("٣", "2"), ["٣", "2"]),
        (("2020-01-02", "3"), ["2020-01-02", "3"]),
        (("9" * 5000, "1"), ["9" * 5000, "1"]),
        ((" 1", "2"), [1, 2]),  # as pandas reads them
    ],
)
def test_a_column_has_one_type(fields: tuple[str, ...], values: list[Any]) -> None:
    found = column(*fields)
    assert found == values
    assert [type(v) for v in found] == [type(v) for v in values]


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(rows=st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=2, max_size=8), delimiter=st.sampled_from(",;\t|"))
def test_what_is_written_with_the_default_delimiter_is_read(rows: list[tuple[str, ...]], delimiter: str) -> None:
    """Test that quoted fields of any text come back, whatever other delimiters they contain."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b", "c"), *rows])
    read = list(read_csv(lambda: io.StringIO(file.getvalue(), newline=""), "a.csv", delimiter, ("a", "b", "c")))
    assert [tuple(row[c] for c in "abc") for _, row in read] == rows


@pytest.mark.parametrize(
    ("content", "delimiter"),
    [
        ("id;text\n1;a, b and c\n2;d\n", ";"),
        ("id\ttext\n1\ta, b; c\n2\td\n", "\t"),
        ("id|text\n1|a, b; c\n", "|"),
        ("id,text\n1,a; b; c\n2,d\n", ","),
        ("text\nhello, world\nfish\n", ","),
        ('id;text\n1;"a\nb, c"\n2;"d;e"\n3;f\n', ";"),
        ("id,text\n", ","),
        ("", ","),
        ("id;price;text\n1;1,5;a\n2;2,5;b\n", ";"),
    ],
)
def test_delimiter_is_found(content: str, delimiter: str) -> None:
    assert find_delimiter(content.splitlines(keepends=True), ",") == delimiter


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_files_of_spreadsheet_programs(tmp_path: Path, encoding: str) -> None:
    rows = "id;text;price\r\n1;größer als üblich, für Haie;1.50\r\n2;fällt über Bord;3\r\n"
    (tmp_path / "a.csv").write_bytes(rows.encode(encoding))
    first, second = DocumentSource([tmp_path / "a.csv"], lambda text: [text])
    assert (first.text, first.metadata) == ("größer als üblich, für Haie", {"price": 1.5})
    assert (second.id, second.metadata) == ("2", {"price": 3.0})
