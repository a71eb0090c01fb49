"""Filters over metadata: ``year >= 2020 AND lang in (en, de) AND NOT draft = true``.

    filter      = conjunction ("OR" conjunction)*
    conjunction = term ("AND" term)*
    term        = "NOT" term | "(" filter ")" | comparison
    comparison  = field ("=" | "!=" | "<" | "<=" | ">" | ">=") value
                | field ["not"] "in" "(" value ("," value)* ")"
                | field "contains" value                           element of an array, or substring of a text
                | field "exists"
    field       = name ("." name)*                                 names of nested objects
    value       = number | true | false | null | "text" | 'text' | word

Types are strict: 2020 is not "2020", and true is not 1. A comparison is false if the field is missing or has another
type; ``!=`` and ``not in`` are the negations of ``=`` and ``in``, so they are true in this case. Keywords are
case-insensitive.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import RetrievalError

Value = str | int | float | bool | None
LONGEST = 10_000  # maximum number of characters of a filter
DEEPEST = 20  # maximum nesting of brackets and NOTs: SQLite's parser stack has 100 entries
WIDEST = 250  # maximum number of conditions joined in one expression: SQLite's limit of the expression depth is 1,000


class FilterError(RetrievalError):
    """Error for an invalid filter."""


@dataclass(frozen=True)
class Compare:
    """Comparison of a field. ``values`` has one value; for "in" any number, for "exists" none."""

    field: tuple[str, ...]
    operator: str  # = < <= > >= in contains exists
    values: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Not:
    """Negation of a condition."""

    part: "Filter"


@dataclass(frozen=True)
class All:
    """Conjunction; true without parts."""

    parts: tuple["Filter", ...]


@dataclass(frozen=True)
class Any_:  # noqa: N801 -- `Any` is taken
    """Disjunction; false without parts."""

    parts: tuple["Filter", ...]


Filter = Compare | Not | All | Any_
EVERYTHING = All(())

_WORD = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<sign><=|>=|!=|==|=|<|>|\(|\)|,)"""
    r"""|(?P<word>[^\s()<>=!,"']+)|(?P<wrong>\S))"""
)
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?\Z")
_FIXED: dict[str, Value] = {"true": True, "false": False, "null": None}


def parse(text: str) -> Filter:
    """Parse a filter.

    Raises:
        FilterError: The filter is invalid; the message names the position.
    """
    if len(text) > LONGEST:
        raise FilterError(f"filter: {len(text)} characters, at most {LONGEST} are read")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise FilterError("filter: not text that UTF-8 can hold")
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        tokens = ((m.lastgroup, m) for m in _WORD.finditer(text))
        self._words = [(kind, m[kind], m.start(kind)) for kind, m in tokens if kind]
        self._at = self._depth = 0

    def read(self) -> Filter:
        condition = self._any()
        if self._at < len(self._words):
            self._wrong("the end, AND or OR")
        return condition

    def _peek(self) -> tuple[str, str]:
        kind, word, _ = self._words[self._at] if self._at < len(self._words) else ("end", "", 0)
        return str(kind), word

    def _keyword(self, *names: str) -> bool:
        kind, word = self._peek()
        if kind in ("word", "sign") and word.lower() in names:
            self._at += 1
            return True
        return False

    def _wrong(self, expected: str) -> None:
        kind, word = self._peek()
        position = f"at character {self._words[self._at][2] + 1}" if kind != "end" else "at the end"
        actual = f", found {word}" if kind != "end" else ""
        raise FilterError(
            f"filter: expected {expected} {position}{actual}; for example: year >= 2020 AND lang in (en, de)"
        )

    def _any(self) -> Filter:
        parts = [self._all()]
        while self._keyword("or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else Any_(tuple(parts))

    def _all(self) -> Filter:
        parts = [self._each()]
        while self._keyword("and"):
            parts.append(self._each())
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _each(self) -> Filter:
        self._depth += 1
        if self._depth > DEEPEST:
            raise FilterError(f"filter: more than {DEEPEST} brackets and NOTs within each other")
        try:
            if self._keyword("not"):
                return Not(self._each())
            if self._keyword("("):
                condition = self._any()
                if not self._keyword(")"):
                    self._wrong(")")
                return condition
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Filter:
        kind, word = self._peek()
        if kind not in ("word", "text"):
            self._wrong("the name of a field")
        self._at += 1
        names = (_unquoted(word),) if kind == "text" else tuple(word.split("."))
        _check_field(names)
        if self._keyword("exists"):
            return Compare(names, "exists")
        if self._keyword("contains"):
            return Compare(names, "contains", (self._value(),))
        if negated := self._keyword("not"):
            if not self._keyword("in"):
                self._wrong("in")
        elif not self._keyword("in"):
            kind, sign = self._peek()
            if kind != "sign" or sign in "(),":
                self._wrong("a comparison (=, !=, <, <=, >, >=, in, contains, exists)")
            self._at += 1
            value = self._value()
            if sign == "!=":
                return Not(Compare(names, "=", (value,)))
            return Compare(names, "=" if sign == "==" else sign, (value,))
        values = self._values()
        return Not(Compare(names, "in", values)) if negated else Compare(names, "in", values)

    def _values(self) -> tuple[Value, ...]:
        if not self._keyword("("):
            self._wrong("(")
        values = [self._value()]
        while self._keyword(","):
            values.append(self._value())
        if not self._keyword(")"):
            self._wrong(", or )")
        return tuple(values)

    def _value(self) -> Value:
        kind, word = self._peek()
        if kind not in ("word", "text"):
            self._wrong("a value")
        self._at += 1
        if kind == "text":
            return _unquoted(word)
        if word.lower() in _FIXED:
            return _FIXED[word.lower()]
        if _NUMBER.match(word):
            if re.search("[.eE]", word) or not -(2**63) <= int(word) < 2**63:
                return float(word)
            return int(word)
        return word


def _unquoted(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1])


# --------------------------------------------------------------------------------------------------------- to SQL

_SQL_TYPES = {str: "'text'", bool: "'true', 'false'", type(None): "'null'", int: "'integer', 'real'"}
_SQL_TYPES[float] = _SQL_TYPES[int]


def to_sql(condition: Filter, depth: int = 0) -> tuple[str, list[Any]]:
    """Translate a condition to an SQL expression over the column ``metadata``, and the values of its placeholders.

    Raises:
        FilterError: The condition is nested too deeply, or a field name is invalid. `parse` checks both already.
    """
    if depth > DEEPEST:
        raise FilterError(f"filter: more than {DEEPEST} conditions within each other")
    match condition:
        case Not(part):
            text, values = to_sql(part, depth + 1)
            return f"NOT {text}", values
        case All(parts) | Any_(parts):
            both = isinstance(condition, All)
            translated = [to_sql(part, depth + 1) for part in parts]
            texts, word = [text for text, _ in translated], " AND " if both else " OR "
            while len(texts) > WIDEST:
                texts = [f"({word.join(texts[i : i + WIDEST])})" for i in range(0, len(texts), WIDEST)]
            return f"({word.join(texts) or int(both)})", [v for _, values in translated for v in values]
    _check_field(condition.field)
    path = "$" + "".join(f'."{name}"' for name in condition.field)
    if condition.operator == "exists":
        return "(json_type(metadata, ?) IS NOT NULL)", [path]
    if condition.operator == "contains":
        value = condition.values[0]
        inside = (
            "EXISTS (SELECT 1 FROM json_each(metadata, ?) e WHERE json_type(metadata, ?) = 'array' "
            f"AND e.type IN ({_SQL_TYPES[type(value)]}) AND e.value IS ?)"
        )
        values = [path, path, _plain(value)]
        if isinstance(value, str):
            held = "json_type(metadata, ?) = 'text' AND instr(json_extract(metadata, ?), ?) > 0"
            inside = f"({inside} OR COALESCE({held}, 0))"
            values += [path, path, value]
        return inside, values
    texts: list[str] = []
    values = []
    values_by_type: dict[str, list[Any]] = {}
    for value in condition.values:
        group = values_by_type.setdefault(_SQL_TYPES[type(value)], [])
        if value is not None or not group:
            group.append(_plain(value))
    for types, group in values_by_type.items():
        marks = ",".join("?" * len(group))
        compare = f"IN ({marks})" if condition.operator in ("=", "in") else f"{condition.operator} ?"
        if group == [None] and condition.operator in ("=", "in"):  # in SQL, NULL = NULL is not true
            compare = "IS ?"
        texts.append(f"COALESCE(json_type(metadata, ?) IN ({types}) AND json_extract(metadata, ?) {compare}, 0)")
        values += [path, path, *group]
    return f"({' OR '.join(texts) or 0})", values


def _check_field(names: Sequence[str]) -> None:
    """Check that a field name can be part of an SQLite JSON path.

    Raises:
        FilterError: A part of the name is empty, or contains a quote, a backslash or a null character.
    """
    if not names or not all(names) or any(c in name for name in names for c in '"\\\0'):
        raise FilterError(f"filter: {'.'.join(names)!r} is no name of a field")


def _plain(value: Value) -> Any:
    """Return a value in the form in which `json_extract` returns it."""
    return int(value) if isinstance(value, bool) else value


# ----------------------------------------------------------------------------------------------------- to Python


def matches(condition: Filter, metadata: Mapping[str, Any]) -> bool:
    """Return whether metadata pass a filter: the same condition as `to_sql`, without a database."""
    match condition:
        case Not(part):
            return not matches(part, metadata)
        case All(parts):
            return all(matches(part, metadata) for part in parts)
        case Any_(parts):
            return any(matches(part, metadata) for part in parts)
    exists, actual = _field(metadata, condition.field)
    if condition.operator == "exists":
        return exists
    if not exists:
        return False
    if condition.operator == "contains":
        wanted = condition.values[0]
        if isinstance(actual, list):
            return any(_same(item, wanted) for item in actual)
        return isinstance(actual, str) and isinstance(wanted, str) and wanted in actual
    return any(_holds(actual, condition.operator, value) for value in condition.values)


def _field(metadata: Any, names: Sequence[str]) -> tuple[bool, Any]:
    for name in names:
        if not isinstance(metadata, Mapping) or name not in metadata:
            return False, None
        metadata = metadata[name]
    return True, metadata


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _same(found: Any, wanted: Value) -> bool:
    return _kind(found) == _kind(wanted) and found == wanted


def _holds(found: Any, operator: str, wanted: Value) -> bool:
    if operator in ("=", "in"):
        return _same(found, wanted)
    if _kind(found) != _kind(wanted) or wanted is None:
        return False
    left: Any = found
    right: Any = wanted
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[operator]
