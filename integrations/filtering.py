"""What filters of RAG frameworks share: a field that is missing and one that is null are the same there."""

import datetime
from collections.abc import Sequence
from typing import Any

from ..retrieval.filters import All, Any_, Compare, Filter, FilterError, Not, Value


def compare(field: tuple[str, ...], operator: str, value: Any) -> Filter:
    """A comparison by one of = != in, not in, contains, < <= > >=.

    Raises:
        FilterError: it has no such value.
    """
    match operator:
        case "=":
            return equal(field, value)
        case "!=":
            return Not(equal(field, value))
        case "in":
            return among(field, value)
        case "not in":
            return Not(among(field, value))
        case "contains":
            return Compare(field, "contains", (scalar(field, value),))
    return ordered(field, operator, value)


def equal(field: tuple[str, ...], value: Any) -> Filter:
    """The field has that value; or none, for None."""
    if value is None:
        return Any_((Not(Compare(field, "exists")), Compare(field, "=", (None,))))
    return Compare(field, "=", (scalar(field, value),))


def among(field: tuple[str, ...], values: Any) -> Filter:
    """The field has one of the values.

    Raises:
        FilterError: they are no list.
    """
    if not isinstance(values, list):
        raise FilterError(f"filter: {'.'.join(field)} is to be one of a list, not of {values!r}")
    return Any_(tuple(equal(field, value) for value in values))


def ordered(field: tuple[str, ...], operator: str, value: Any) -> Filter:
    """The field is less, or more; nothing is less or more than None.

    Raises:
        FilterError: such values have no order.
    """
    if value is None:
        return Any_(())
    plain = scalar(field, value)
    if isinstance(plain, bool) or (isinstance(plain, str) and not _is_date(plain)):
        raise FilterError(f"filter: {'.'.join(field)} {operator} {value!r}: numbers and ISO dates have an order")
    return Compare(field, operator, (plain,))


def every(parts: Sequence[Filter]) -> Filter:
    """All of it holds."""
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def scalar(field: tuple[str, ...], value: Any) -> Value:
    """A value that a filter may have.

    Raises:
        FilterError: it is none.
    """
    if isinstance(value, datetime.date):
        return value.isoformat()
    if value is not None and not isinstance(value, str | int | float):
        raise FilterError(
            f"filter: {'.'.join(field)} is compared with {value!r}; expected text, a number, true or false"
        )
    return value


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
