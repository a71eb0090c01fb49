"""Shared parts of the filters of RAG frameworks.

In these frameworks a missing field and a field that is null are the same.
"""

import datetime
from collections.abc import Sequence
from typing import Any

from ..retrieval.filter_matching import instant
from ..retrieval.filters import All, Any_, Compare, Filter, FilterError, Not, Scalar


def compare(field: tuple[str, ...], operator: str, value: Any) -> Filter:
    """Build a comparison.

    Args:
        field: Name of the field; names of nested objects are the items before the last.
        operator: One of = != in, not in, contains, < <= > >=.
        value: Value to compare with; a list for ``in`` and ``not in``.

    Raises:
        FilterError: The operator does not support the value.
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
    """Build a test that the field has a value; for None, that it is missing or null."""
    if value is None:
        return Any_((Not(Compare(field, "exists")), Compare(field, "=", (None,))))
    if isinstance(value, list | tuple):
        return Compare(field, "=", (tuple(scalar(field, item) for item in value),))
    return Compare(field, "=", (scalar(field, value),))


def among(field: tuple[str, ...], values: Any) -> Filter:
    """Build a test that the field has one of the values.

    Raises:
        FilterError: ``values`` is not a list.
    """
    if not isinstance(values, list | tuple | set | frozenset):
        raise FilterError(f"filter: {'.'.join(field)} in {values!r}: expected a list")
    return Any_(tuple(equal(field, value) for value in values))


def ordered(field: tuple[str, ...], operator: str, value: Any) -> Filter:
    """Build a comparison by order, which is false for None.

    Raises:
        FilterError: The value is not a number or an ISO date.
    """
    if value is None:
        return Any_(())
    plain = scalar(field, value)
    if isinstance(plain, bool) or (isinstance(plain, str) and instant(plain) is None):
        raise FilterError(f"filter: {'.'.join(field)} {operator} {value!r}: expected a number or an ISO date")
    return Compare(field, operator, (plain,))


def every(parts: Sequence[Filter]) -> Filter:
    """Build the conjunction of filters."""
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def scalar(field: tuple[str, ...], value: Any) -> Scalar:
    """Return a value for a comparison; a date becomes text in ISO format.

    Raises:
        FilterError: The value is not text, a number, true, false or null.
    """
    if isinstance(value, datetime.date):
        return value.isoformat()
    if value is not None and not isinstance(value, str | int | float):
        raise FilterError(
            f"filter: {'.'.join(field)} is compared with {value!r}; expected text, a number, true or false"
        )
    return value
