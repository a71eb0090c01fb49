"""Evaluation of filters on metadata, and the comparison of two values; see `filters` for the rules."""

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .filters import All, Any_, Filter, Not, Value
from .text_normalization import fold

_ISO = re.compile(
    r"(\d{4})-(\d{2})-(\d{2})(?:[Tt ](\d{2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?\s?(Z|z|([+-])(\d{2})(?::?(\d{2}))?)?)?",
    re.ASCII,
)
Instant = tuple[int, str]  # seconds since year 1, and the digits of the fraction


def matches(condition: Filter, metadata: Mapping[str, Any]) -> bool:
    """Return whether metadata pass a filter."""
    match condition:
        case Not(part):
            return not matches(part, metadata)
        case All(parts):
            return all(matches(part, metadata) for part in parts)
        case Any_(parts):
            return any(matches(part, metadata) for part in parts)
    exists, actual = find_field(metadata, condition.field)
    if condition.operator == "exists":
        return exists
    return exists and any(holds(actual, condition.operator, value) for value in condition.values)


def find_field(metadata: Any, names: Sequence[str]) -> tuple[bool, Any]:
    """Return whether a field exists, and its value: the key with all names joined by dots, else the path of keys."""
    whole = ".".join(names)
    if isinstance(metadata, Mapping) and whole in metadata:
        return True, metadata[whole]
    for name in names:
        if not isinstance(metadata, Mapping) or name not in metadata:
            return False, None
        metadata = metadata[name]
    return True, metadata


def holds(found: Any, operator: str, wanted: Value) -> bool:
    """Return whether a stored value compares to a value of a filter as the operator says."""
    match operator:
        case "=" | "in":
            return equal(found, wanted)
        case "contains":
            if isinstance(found, list):
                return any(equal(item, wanted) for item in found)
            return isinstance(found, str) and isinstance(wanted, str) and fold(wanted) in fold(found)
    if _kind(found) != _kind(wanted) or found is None or isinstance(found, list | dict):
        return False
    left, right = comparable(found, wanted)
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[operator]


def equal(found: Any, wanted: Value) -> bool:
    """Return whether a stored value is equal to a value of a filter; lists are compared item by item."""
    if isinstance(wanted, list | tuple):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(equal(*pair) for pair in zip(found, wanted, strict=True))
        )
    if _kind(found) != _kind(wanted) or isinstance(found, list | dict):
        return False
    left, right = comparable(found, wanted)
    return left == right


def comparable(found: Any, wanted: Any) -> tuple[Any, Any]:
    """Return two values of the same type in a form that Python compares: instants, folded texts, or unchanged."""
    if not isinstance(found, str):
        return found, wanted
    instants = instant(found), instant(wanted)
    return instants if None not in instants else (fold(found), fold(wanted))


@functools.lru_cache(maxsize=1 << 12)
def instant(text: str) -> Instant | None:
    """Return the instant of an ISO date or datetime, or None if a text is neither."""
    parts = _ISO.fullmatch(text)
    if parts is None:
        return None
    year, month, day, hour, minute, second, fraction, zone, sign, zone_hour, zone_minute = parts.groups()
    try:
        days = datetime.date(int(year), int(month), int(day)).toordinal()
        datetime.time(int(hour or 0), int(minute or 0), int(second or 0))
    except ValueError:
        return None
    seconds = days * 86_400 + int(hour or 0) * 3600 + int(minute or 0) * 60 + int(second or 0)
    if zone is not None and sign is not None:
        if int(zone_hour) > 23 or int(zone_minute or 0) > 59:
            return None
        offset = int(zone_hour) * 3600 + int(zone_minute or 0) * 60
        seconds += offset if sign == "-" else -offset
    return seconds, (fraction or "").rstrip("0")


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
