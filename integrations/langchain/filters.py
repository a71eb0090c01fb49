"""Translation of LangChain's filters.

Example: ``{"year": {"$gte": 2020}, "$or": [{"lang": "en"}, {"lang": "de"}]}``.
"""

from collections.abc import Mapping
from typing import Any

from ...retrieval.filters import Any_, Compare, Filter, FilterError, Not
from .. import filtering

OPERATORS = {
    "$eq": "=",
    "$ne": "!=",
    "$lt": "<",
    "$lte": "<=",
    "$gt": ">",
    "$gte": ">=",
    "$in": "in",
    "$nin": "not in",
    "$contains": "contains",
}


def to_pilotfish_filter(given: str | Filter | Mapping[str, Any] | None) -> str | Filter | None:
    """Translate a mapping with ``$`` operators to a Pilotfish filter.

    Names of nested fields are joined by dots. The operators of a field are $eq, $ne, $lt, $lte, $gt, $gte, $in, $nin,
    $exists and $contains. Filters are combined by $and, $or and $not.

    Args:
        given: Mapping; a Pilotfish filter and None are returned unchanged.

    Raises:
        FilterError: The filter is invalid.
    """
    if given is None or isinstance(given, str | Filter):
        return given
    if not isinstance(given, Mapping):
        raise FilterError(f"filter: expected text or a mapping, got {type(given).__name__}")
    return _every(given) if given else None


def _every(given: Any) -> Filter:
    if not isinstance(given, Mapping) or not given:
        raise FilterError(f"filter: expected a mapping of fields, got {given!r}")
    return filtering.every([_part(str(key), value) for key, value in given.items()])


def _part(key: str, value: Any) -> Filter:
    if key in ("$and", "$or"):
        if not isinstance(value, list) or not value:
            raise FilterError(f"filter: {key} takes a list of filters")
        parts = [_every(part) for part in value]
        return filtering.every(parts) if key == "$and" else Any_(tuple(parts))
    if key == "$not":
        return Not(_every(value))
    if key.startswith("$"):
        raise FilterError(f"filter: unknown operator {key}; known are $and, $or, $not")
    field = tuple(key.split("."))
    if not isinstance(value, Mapping):
        return filtering.equal(field, value)
    if not value:
        raise FilterError(f"filter: {key} is compared with nothing")
    return filtering.every([_comparison(field, operator, operand) for operator, operand in value.items()])


def _comparison(field: tuple[str, ...], operator: str, value: Any) -> Filter:
    if operator == "$exists":
        exists = Compare(field, "exists")
        return exists if value else Not(exists)
    if operator not in OPERATORS:
        raise FilterError(f"filter: unknown operator {operator}; known are {', '.join(OPERATORS)}, $exists")
    return filtering.compare(field, OPERATORS[operator], value)
