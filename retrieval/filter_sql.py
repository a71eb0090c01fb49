"""Translation of filters to SQL over a column of JSON objects.

Comparisons that SQLite cannot do as `filter_matching` does (texts, lists, integers beyond 53 bits, unusual names) call
functions of `filter_matching`, which the connection registers.
"""

import functools
import json
import sqlite3
from typing import Any

from .filter_matching import Instant, holds, instant, matches
from .filters import DEEPEST, All, Any_, Compare, Filter, FilterError, Not, Value, check_field
from .text_normalization import fold

WIDEST = 250  # maximum number of conditions joined in one expression: SQLite's limit of the expression depth is 1,000
EXACT = 2**53  # numbers up to here are the same in SQLite and in Python
_SQL_TYPES = {str: "'text'", bool: "'true', 'false'", type(None): "'null'", int: "'integer', 'real'"}
_SQL_TYPES[float] = _SQL_TYPES[int]


def register_functions(database: sqlite3.Connection) -> None:
    """Register the functions that the output of `to_sql` calls."""
    database.create_function("filter_matches", 2, _filter_matches, deterministic=True)
    database.create_function("text_holds", 3, _text_holds, deterministic=True)
    database.create_function("text_among", 2, _text_among, deterministic=True)


def to_sql(condition: Filter, depth: int = 0) -> tuple[str, list[Any]]:
    """Translate a condition to an SQL expression over the column ``metadata``, and the values of its placeholders.

    Raises:
        FilterError: The condition is nested too deeply, or the name of a field is empty.
    """
    if depth > DEEPEST:
        raise FilterError(f"filter: more than {DEEPEST} conditions within each other")
    match condition:
        case Not(part):
            text, values = to_sql(part, depth + 1)
            return f"NOT {text}", values
        case All(conditions) | Any_(conditions):
            both = isinstance(condition, All)
            translated = [to_sql(part, depth + 1) for part in conditions]
            texts, word = [text for text, _ in translated], " AND " if both else " OR "
            while len(texts) > WIDEST:
                texts = [f"({word.join(texts[i : i + WIDEST])})" for i in range(0, len(texts), WIDEST)]
            return f"({word.join(texts) or int(both)})", [v for _, values in translated for v in values]
    check_field(condition.field)
    if not _is_native(condition):
        return "filter_matches(metadata, ?)", [_body(condition)]
    path, names = _path(condition.field)
    if condition.operator == "exists":
        return f"(json_type(metadata, {path}) IS NOT NULL)", names
    operator = "=" if condition.operator == "in" else condition.operator
    parts: list[tuple[str, list[Any]]] = []
    by_type: dict[str, list[Any]] = {}
    for value in condition.values:
        by_type.setdefault(_SQL_TYPES[type(value)], []).append(int(value) if isinstance(value, bool) else value)
    for types, group in by_type.items():
        if types == _SQL_TYPES[type(None)]:
            parts.append((f"(json_type(metadata, {path}) IS 'null')", names) if operator == "=" else ("0", []))
        elif types == _SQL_TYPES[str]:
            function, arguments = "text_holds", [operator, *group]
            if operator == "=":
                function, arguments = "text_among", [json.dumps(group)]
            call = f"{function}(json_extract(metadata, {path}){', ?' * len(arguments)})"
            parts.append((f"(json_type(metadata, {path}) IS 'text' AND {call})", [*names, *names, *arguments]))
        else:
            compare = f"IN ({','.join('?' * len(group))})" if operator == "=" else f"{operator} ?"
            found = f"json_type(metadata, {path}) IN ({types}) AND json_extract(metadata, {path}) {compare}"
            parts.append((f"COALESCE({found}, 0)", [*names, *names, *group]))
    text, values = f"({' OR '.join(text for text, _ in parts) or 0})", [v for _, values in parts for v in values]
    if _SQL_TYPES[str] not in by_type:
        return text, values
    # SQLite's json_extract cuts texts off at a null character.
    whole = "filter_matches(metadata, ?)"
    return f"CASE WHEN instr(metadata, '\\u0000') THEN {whole} ELSE {text} END", [_body(condition), *values]


def _path(names: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the SQL of a JSON path, and its values: the key with all names joined by dots, else the path of keys."""
    path = "$" + "".join(f'."{name}"' for name in names)
    if len(names) == 1:
        return "?", [path]
    whole = f'$."{".".join(names)}"'
    return "CASE WHEN json_type(metadata, ?) IS NULL THEN ? ELSE ? END", [whole, path, whole]


def _is_native(condition: Compare) -> bool:
    """Return whether SQLite finds the field and compares the values as Python does."""
    plain = all(name and name.isprintable() and not set(name) & {'"', "\\"} for name in condition.field)
    return plain and condition.operator != "contains" and all(map(_is_simple, condition.values))


def _is_simple(value: Value) -> bool:
    if isinstance(value, str):
        return "\0" not in value
    if isinstance(value, float):
        return abs(value) < EXACT and (value.is_integer() or len(repr(value)) < 16)
    return not isinstance(value, tuple | list) and (value is None or abs(value) < EXACT)


def _text_holds(found: Any, operator: str, wanted: str) -> bool:
    """Return whether a stored value is a text that compares to another as the operator says."""
    return isinstance(found, str) and holds(found, operator, wanted)


def _text_among(found: Any, body: str) -> bool:
    """Return whether a stored value is equal to one of the texts in a JSON array."""
    if not isinstance(found, str):  # SQLite may call this before it tests the type
        return False
    folded, instants = _texts(body)
    return fold(found) in folded or (bool(instants) and instant(found) in instants)


@functools.lru_cache(maxsize=256)
def _texts(body: str) -> tuple[frozenset[str], frozenset[Instant]]:
    texts = json.loads(body)
    instants = frozenset(moment for text in texts if (moment := instant(text)) is not None)
    return frozenset(map(fold, texts)), instants


def _body(condition: Compare) -> str:
    """Return a comparison as JSON.

    Raises:
        FilterError: A value is not text, a number, true, false, null or a list of them.
    """
    try:
        return json.dumps([condition.field, condition.operator, condition.values])
    except (TypeError, ValueError) as error:
        raise FilterError(f"filter: {'.'.join(condition.field)}: {error}") from None


def _filter_matches(metadata: str, body: str) -> bool:
    return matches(_compare(body), json.loads(metadata))


@functools.lru_cache(maxsize=256)
def _compare(body: str) -> Compare:
    field, operator, values = json.loads(body)
    return Compare(tuple(field), operator, tuple(values))
