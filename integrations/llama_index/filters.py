"""Translation of LlamaIndex's metadata filters."""

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
    FilterOperator.TEXT_MATCH_INSENSITIVE: "contains",
    **{o: o.value for o in (FilterOperator.LT, FilterOperator.LTE, FilterOperator.GT, FilterOperator.GTE)},
}


def to_pilotfish_filter(given: MetadataFilters | str | None) -> Filter | str | None:
    """Translate LlamaIndex's metadata filters to a Pilotfish filter.

    Args:
        given: LlamaIndex's filters; a Pilotfish filter as text and None are returned unchanged.

    Raises:
        FilterError: An operator is not supported, such as a case-insensitive text match, or a value is invalid.
    """
    if given is None or isinstance(given, str):
        return given
    parts = [_comparison(f) if isinstance(f, MetadataFilter) else to_pilotfish_filter(f) for f in given.filters]
    conditions = [part for part in parts if part is not None and not isinstance(part, str)]
    if not conditions:
        return None
    match given.condition:
        case FilterCondition.OR:
            return Any_(tuple(conditions))
        case FilterCondition.NOT:
            return Not(filtering.every(conditions))
    return filtering.every(conditions)


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
    raise FilterError(f"filter: operator {given.operator.value} is not supported; text matches are case-sensitive")
