"""Translation of Haystack's filters."""

from collections.abc import Mapping
from typing import Any

from haystack.errors import FilterError

from ...retrieval import filters
from ...retrieval.filters import Any_, Filter, Not
from .. import filtering

OPERATORS = {"==": "=", **{name: name for name in ("!=", "<", "<=", ">", ">=", "in", "not in")}}


def to_pilotfish_filter(given: Mapping[str, Any] | None) -> Filter | None:
    """Translate a Haystack filter over metadata to a Pilotfish filter.

    Raises:
        FilterError: The filter is invalid, or concerns a field that is not metadata; a `haystack.errors.FilterError`.
    """
    if not given:
        return None
    try:
        return _part(given)
    except filters.FilterError as error:
        raise FilterError(str(error)) from None


def _part(given: Any) -> Filter:
    if not isinstance(given, Mapping):
        raise FilterError(f"filter: expected a mapping, got {given!r}")
    if "operator" not in given:
        raise FilterError(f"filter: there is no 'operator' in {given}")
    if "field" in given:
        if "value" not in given:
            raise FilterError(f"filter: there is no 'value' in {given}")
        return _comparison(str(given["field"]), given["operator"], given["value"])
    if not isinstance(given.get("conditions"), list | tuple):
        raise FilterError(f"filter: there are no 'conditions' in {given}")
    parts = [_part(part) for part in given["conditions"]]
    match given["operator"]:
        case "AND":
            return filtering.every(parts)
        case "OR":
            return Any_(tuple(parts))
        case "NOT":
            return Not(filtering.every(parts))
    raise FilterError(f"filter: unknown operator {given['operator']!r}; known are AND, OR, NOT")


def _comparison(name: str, operator: Any, value: Any) -> Filter:
    if name in ("id", "content", "score", "embedding", "blob", "sparse_embedding"):
        raise FilterError(f"filter: {name!r} is not a metadata field; expected meta.NAME")
    if operator not in OPERATORS:
        raise FilterError(f"filter: unknown operator {operator!r}; known are {', '.join(OPERATORS)}")
    if operator in ("in", "not in") and not isinstance(value, list):  # as Haystack's own tests require
        raise FilterError(f"filter: {name} {operator} {value!r}: expected a list")
    return filtering.compare(tuple(name.removeprefix("meta.").split(".")), OPERATORS[operator], value)
