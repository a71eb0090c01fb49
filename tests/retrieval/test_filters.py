"""Tests of filters: SQL and Python give the same result, and syntax errors are reported in one line."""

import contextlib
import json
import sqlite3
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import filters
from pilotfish.retrieval.filters import All, Any_, Compare, Filter, FilterError, Not

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([0.5, 2.0, -1.5, 1e300]),
    st.sampled_from(["", "a", "b", "ab", "2", "true", "é", "o'x"]),
)
METADATA = st.dictionaries(
    st.sampled_from(["a", "b", "c d"]),
    st.one_of(
        SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from(["x", "y"]), SCALARS, max_size=2)
    ),
)
FIELDS = st.sampled_from([("a",), ("b",), ("c d",), ("a", "x"), ("missing",)])
COMPARE = st.one_of(
    st.builds(Compare, FIELDS, st.sampled_from(["=", "<", "<=", ">", ">=", "contains"]), st.tuples(SCALARS)),
    st.builds(Compare, FIELDS, st.just("in"), st.lists(SCALARS, min_size=1, max_size=3).map(tuple)),
    st.builds(Compare, FIELDS, st.just("exists")),
)
FILTERS = st.recursive(
    COMPARE,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(All, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Any_, st.lists(inner, min_size=1, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(condition=FILTERS, metadata=METADATA)
def test_sql_and_python_give_the_same_result(condition: Filter, metadata: dict[str, Any]) -> None:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE documents (metadata TEXT)")
    database.execute("INSERT INTO documents VALUES (?)", [json.dumps(metadata)])
    text, values = filters.to_sql(condition)
    count = database.execute(f"SELECT COUNT(*) FROM documents WHERE {text}", values).fetchone()[0]
    database.close()
    assert bool(count) == filters.matches(condition, metadata)


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("year >= 2020 AND lang in (en, de)", {"year": 2021, "lang": "de"}, {"year": 2021, "lang": "fr"}),
        ("year=2020", {"year": 2020}, {"year": "2020"}),
        ("year = '2020'", {"year": "2020"}, {"year": 2020}),
        ("not draft = true", {}, {"draft": True}),
        ("draft != true", {"draft": 1}, {"draft": True}),
        ("a = 1 or b = 2 and c = 3", {"a": 1}, {"b": 2}),
        ("(a = 1 or b = 2) and c = 3", {"b": 2, "c": 3}, {"a": 1}),
        ("tags contains red", {"tags": ["blue", "red"]}, {"tags": ["reddish"]}),
        ('title contains "and b"', {"title": "a and b"}, {"title": "ab"}),
        ("author.name exists", {"author": {"name": None}}, {"author": "x"}),
        ("lang not in (en)", {"lang": "de"}, {"lang": "en"}),
        ('"a b" <= -1.5e0', {"a b": -2}, {"a b": 0}),
        ("x = null", {"x": None}, {}),
        (r'x = "a\"b"', {"x": 'a"b'}, {"x": "ab"}),
        ("date >= 2020-05-01", {"date": "2021-01-01"}, {"date": "2019-01-01"}),
    ],
)
def test_filter_expressions_match_metadata(text: str, yes: dict, no: dict) -> None:
    condition = filters.parse(text)
    assert filters.matches(condition, yes)
    assert not filters.matches(condition, no)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a field at the end"),
        ("year", "expected a comparison"),
        ("year >= ", "expected a value at the end"),
        ("year >= 2020 lang = en", "expected the end, AND or OR at character 14, found lang"),
        ("lang in en", r"expected \( at character 9"),
        ("lang in (en", r"expected , or \) at the end"),
        ("(a = 1", r"expected \) at the end"),
        ("a..b = 1", "no name of a field"),
        ("(" * 60 + "a = 1" + ")" * 60, "more than 20 brackets"),
        ("a = 1 " * 5000, "at most 10000"),
        ("a = \ud800", "UTF-8"),
    ],
)
def test_refuses_invalid_filters(text: str, message: str) -> None:
    with pytest.raises(FilterError, match=message) as caught:
        filters.parse(text)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="ab=<>!()'\",. \\inNOTandor1", max_size=40)))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(FilterError):
        filters.to_sql(filters.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        f"x in ({','.join(map(str, range(2000)))})",
        " OR ".join(f"x={i}" for i in range(1100)),
        "NOT " * 19 + "x = 1",
        "".join(f"(x = {i} {('AND', 'OR')[i % 2]} " for i in range(19)) + "x = 3" + ")" * 19,
        "x > 1 OR " + "(" * 19 + "x in (1, a, true, null)" + ")" * 19,
    ],
)
def test_every_valid_filter_runs_in_sqlite(text: str) -> None:
    condition = filters.parse(text)
    marked, values = filters.to_sql(condition)
    with sqlite3.connect(":memory:") as database:
        for x in (0, 3, 1099, 5000, "a", True, None):
            answer = database.execute(f"SELECT {marked} FROM (SELECT ? AS metadata)", [*values, json.dumps({"x": x})])
            assert bool(answer.fetchone()[0]) == filters.matches(condition, {"x": x})


def test_largest_integer_matches() -> None:
    assert filters.matches(filters.parse(f"m = {2**63 - 1}"), {"m": 2**63 - 1})


@pytest.mark.parametrize("name", ["a\0b", 'a"b', "", "a\\b"])
def test_refuses_invalid_field_names_in_filter_objects(name: str) -> None:
    with pytest.raises(FilterError, match="no name of a field"):
        filters.to_sql(Compare((name,), "=", (1,)))
