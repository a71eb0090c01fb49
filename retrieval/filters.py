"""Filters over metadata: ``year >= 2020 AND lang in (en, de) AND NOT draft = true``.

    filter      = conjunction ("OR" conjunction)*
    conjunction = term ("AND" term)*
    term        = "NOT" term | "(" filter ")" | comparison
    comparison  = field ("=" | "!=" | "<" | "<=" | ">" | ">=") value
                | field ["not"] "in" "(" value ("," value)* ")"
                | field "contains" value                           element of an array, or substring of a text
                | field "exists"
    field       = name ("." name)*                                 names of nested objects
    value       = number | true | false | null | "text" | 'text' | word | "(" [value ("," value)*] ")"

A value in brackets is a list, for = and != only. Types are strict: 2020 is not "2020", and true is not 1. A comparison
is false if the field is missing or has another type; ``!=`` and ``not in`` are the negations of ``=`` and ``in``, so
they are true in this case. Keywords are case-insensitive.

Texts are compared in Unicode NFKC, case-folded. Two ISO dates or datetimes are compared as instants; a date is its
midnight, and a time without an offset is in UTC. A name with dots is first looked up as one key, then as a path.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import RetrievalError

Scalar = str | int | float | bool | None
Value = Scalar | tuple["Value", ...]  # a tuple is a list
LONGEST = 10_000  # maximum number of characters of a filter
DEEPEST = 20  # maximum nesting of brackets and NOTs: SQLite's parser stack has 100 entries
DIGITS = 4000  # maximum number of digits of an integer, which Python limits, too


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
_FIXED: dict[str, Scalar] = {"true": True, "false": False, "null": None}


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
        check_field(names)
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
            value = self._list() if sign in ("=", "==", "!=") and self._peek() == ("sign", "(") else self._value()
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

    def _list(self) -> Value:
        self._at += 1
        if self._keyword(")"):
            return ()
        self._at -= 1
        return self._values()

    def _value(self) -> Scalar:
        kind, word = self._peek()
        if kind not in ("word", "text"):
            self._wrong("a value")
        self._at += 1
        if kind == "text":
            return _unquoted(word)
        if word.lower() in _FIXED:
            return _FIXED[word.lower()]
        if _NUMBER.match(word):
            if re.search("[.eE]", word):
                return float(word)
            if len(word) > DIGITS:
                raise FilterError(f"filter: an integer of {len(word)} digits, at most {DIGITS} are read")
            return int(word)
        return word


def _unquoted(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1])


def check_field(names: Sequence[str]) -> None:
    """Check that a field has a name.

    Raises:
        FilterError: The name is empty.
    """
    if not names or names == ("",):
        raise FilterError("filter: the name of a field is empty")
