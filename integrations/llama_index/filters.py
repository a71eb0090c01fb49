"""LlamaIndex's metadata filters as ours."""

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from ...retrieval.filters import Any_, Filter, FilterError, Not
from .. import filtering

OPERATORS = {
    FilterOperator.EQ: "=",
    FilterOperator.NE: "!=",
    FilterOperator.IN: "in",
    FilterOperator.NIN: "not in",
    FilterOperator.CONTAINS: "contains",
    FilterOperator.TEXT_MATCH: "contains",
    **{o: o.value for o in (FilterOperator.LT, FilterOperator.LTE, FilterOperator.GT, FilterOperator.GTE)},
}


def to_pilotfish_filter(given: MetadataFilters | str | None) -> Filter | str | None:
    """A filter of ours; ours and None as they are.

    Raises:
        FilterError: something of it has no counterpart: matches in texts without regard to case.
    """
    if given is None or isinstance(given, str):
        return given
    parts = [_comparison(f) if isinstance(f, MetadataFilter) else to_pilotfish_filter(f) for f in given.filters]
    found = [part for part in parts if part is not None and not isinstance(part, str)]
    if not found:
        return None
    match given.condition:
        case FilterCondition.OR:
            return Any_(tuple(found))
        case FilterCondition.NOT:
            return Not(filtering.every(found))
    return filtering.every(found)


def _comparison(given: MetadataFilter) -> Filter:
    field, value = tuple(given.key.split(".")), given.value
    if given.operator in OPERATORS:
        return filtering.compare(field, OPERATORS[given.operator], value)
    match given.operator:
        case FilterOperator.ANY | FilterOperator.ALL:
            if not isinstance(value, list):
                raise FilterError(f"filter: {given.key} {given.operator.value}: expected a list, got {value!r}")
            each = [filtering.compare(field, "contains", v) for v in value]
            return filtering.every(each) if given.operator == FilterOperator.ALL else Any_(tuple(each))
        case FilterOperator.IS_EMPTY:
            return Any_((filtering.equal(field, None), filtering.equal(field, "")))
    raise FilterError(f"filter: {given.operator.value} is not possible; texts are compared as they are")
