"""Records of files: JSON lines, JSON lists, CSV and Parquet tables."""

import datetime
import decimal
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import csv_files
from .errors import RetrievalError, first_line, require_module
from .text_encoding import detect_encoding, open_text, suffix_of

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FIELDS = ("_id", "id", "text", "title", "metadata")


def read_records(
    path: Path | None, name: str, on_note: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[int, Any]]:
    """Iterate over the records of a file, as (record number from 1 on, record).

    Args:
        path: Path of the file; None for JSON lines on standard input.
        name: Name of the file, whose suffix is its format.
        on_note: Called with a message about parts of the file that are left out.

    Raises:
        RetrievalError: The file cannot be read.
    """
    suffix, at = suffix_of(name) if path else ".jsonl", 0
    try:
        if suffix == ".parquet":
            assert path is not None
            yield from enumerate(_parquet(path, name, on_note), 1)
        elif suffix in (".csv", ".tsv"):
            assert path is not None
            encoding = detect_encoding(path, name)
            delimiter = "\t" if suffix == ".tsv" else ","
            yield from csv_files.read_csv(lambda: open_text(path, name, encoding), name, delimiter, FIELDS)
        elif suffix == ".json":
            with open_text(path, name) as file:
                records = json.load(file)
            if not isinstance(records, list):
                raise RetrievalError(f"{name}: expected a list of objects")
            yield from enumerate(records, 1)
        else:
            with open_text(path, name) as file:
                for at, line in enumerate(file, 1):
                    if line.strip():
                        yield at, _parse_line(line, f"{name}, record {at}")
    except RetrievalError:
        raise
    except UnicodeError:
        raise RetrievalError(f"{name}, record {at + 1}: not UTF-8 text") from None
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        raise RetrievalError(f"{name}: {first_line(error)}") from None
    except OSError as error:
        raise RetrievalError(f"{name}: {error.strerror or error}") from None


def _parse_line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise RetrievalError(f"{place}: {first_line(error)}") from None


def _parquet(path: Path, name: str, on_note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    require_module("pyarrow", ".parquet")
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:  # opened here, so that error messages of pyarrow do not contain the path
            schema = pq.read_schema(file)
            undecodable = _delta_columns(pq.read_metadata(file))
            texts = [f.name for f in schema if pyarrow.types.is_string(f.type) and f.name not in undecodable]
            left_out = [f for f in schema if not _is_supported(f.type)]
            if left_out:
                columns = ", ".join(f"{f.name} ({f.type})" for f in left_out)
                on_note(f"{name}: left out columns of types that metadata cannot hold: {columns}")
            columns = [f.name for f in schema if f not in left_out]
            # Dictionary encoding and conversion row by row limit memory: compressed tables may be huge.
            for batch in pq.ParquetFile(file, read_dictionary=texts).iter_batches(1024, columns=columns):
                rows = _microseconds(batch)
                yield from (_json(rows.slice(row, 1).to_pylist()[0]) for row in range(rows.num_rows))
    except (pyarrow.ArrowException, OverflowError) as error:  # OverflowError: dates beyond the year 9999
        raise RetrievalError(f"{name}: {first_line(error)}") from None


def _delta_columns(metadata: Any) -> set[str]:
    """Return the columns with delta encodings, which pyarrow cannot decode to dictionaries."""
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    return {chunk.path_in_schema for chunk in chunks if any(e.startswith("DELTA") for e in chunk.encodings)}


def _is_supported(kind: Any, nested: bool = False) -> bool:
    """Return whether the values of a column can be metadata: numbers, text, dates, true or false, lists and structs."""
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_supported(kind.value_type, nested=True)
    if types.is_struct(kind):
        return all(_is_supported(kind.field(i).type, nested=True) for i in range(kind.num_fields))
    if nested and _has_nanoseconds(kind):
        return False
    tests = types.is_boolean, types.is_integer, types.is_floating, types.is_null, types.is_date, types.is_timestamp
    return any(test(kind) for test in (*tests, types.is_string, types.is_large_string, types.is_decimal, types.is_time))


def _has_nanoseconds(kind: Any) -> bool:
    from pyarrow import types

    return (types.is_timestamp(kind) or types.is_time64(kind)) and kind.unit == "ns"


def _microseconds(batch: Any) -> Any:
    """Truncate timestamps and times to microseconds, the precision of Python's datetime."""
    import pyarrow

    for i, field in enumerate(batch.schema):
        if _has_nanoseconds(field.type):
            is_time = pyarrow.types.is_time64(field.type)
            kind = pyarrow.time64("us") if is_time else pyarrow.timestamp("us", field.type.tz)
            batch = batch.set_column(i, field.name, batch.column(i).cast(kind, safe=False))
    return batch


def _json(value: Any) -> Any:
    """Convert a value of a Parquet table to JSON: dates to text, decimals to numbers, NaN and infinity to null."""
    match value:
        case dict():
            return {k: _json(v) for k, v in value.items()}
        case list():
            return [_json(v) for v in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() if value.is_finite():
            return int(value) if value == value.to_integral_value() else float(value)
        case decimal.Decimal():
            return None
        case float():
            return value if math.isfinite(value) else None
    return value
