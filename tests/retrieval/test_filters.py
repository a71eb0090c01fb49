"""Tests of filters: SQL and Python give the same result, and syntax errors are reported in one line."""

import contextlib
import datetime
import json
import sqlite3
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import filter_matching, filter_sql, filters
from pilotfish.retrieval.filters import All, Any_, Compare, Filter, FilterError, Not

TEXTS = ["", "a", "A", "b", "ab", "2", "true", "é", "E\u0301", "Ｂ", "o'x", "a\0b", "straße", "STRASSE", "\0"]
DATES = [
    "2020-05-01",
    "2020-05-01T00:00:00Z",
    "2020-05-01T02:00:00+02:00",
    "2020-04-30 22:00-02",
    "2020-05-01T00:00:00.5",
    "2020-05-01T00:00:00.500000000001Z",
    "2020-02-30",
    "0001-01-01T00:00+14:00",
    "9999-12-31T23:59:59-12:00",
]
NUMBERS = [
    0.5,
    2.0,
    -1.5,
    0.1,
    0.30000000000000004,
    1e300,
    2**53,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**70 + 1,
    -(2**64),
    1e19,
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(DATES),
)
INNER = st.dictionaries(st.sampled_from(["x", "y", "x.y", "Ａ"]), SCALARS, max_size=2)
METADATA = st.dictionaries(
    st.sampled_from(["a", "b", "c d", "a.x", "a.b.c", 'q"', "back\\slash", "line\nbreak"]),
    st.one_of(SCALARS, st.lists(SCALARS, max_size=3), INNER),
)
DOTTED = [("a", "x"), ("a", "b", "c"), ("b", "x", "y"), ("a", "", "x")]
FIELDS = st.sampled_from([*DOTTED, ("a",), ("b",), ("c d",), ("missing",), ('q"',), ("back\\slash",), ("line\nbreak",)])
LISTS = st.lists(SCALARS, max_size=3).map(tuple)
COMPARE = st.one_of(
    st.builds(Compare, FIELDS, st.sampled_from(["=", "<", "<=", ">", ">=", "contains"]), st.tuples(SCALARS)),
    st.builds(Compare, FIELDS, st.just("in"), st.lists(st.one_of(SCALARS, LISTS), max_size=3).map(tuple)),
    st.builds(Compare, FIELDS, st.just("="), st.tuples(LISTS)),
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
    filter_sql.register_functions(database)
    database.execute("CREATE TABLE documents (metadata TEXT)")
    database.execute("INSERT INTO documents VALUES (?)", [json.dumps(metadata, ensure_ascii=False)])
    text, values = filter_sql.to_sql(condition)
    count = database.execute(f"SELECT COUNT(*) FROM documents WHERE {text}", values).fetchone()[0]
    database.close()
    assert bool(count) == filter_matching.matches(condition, metadata)


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
    assert filter_matching.matches(condition, yes)
    assert not filter_matching.matches(condition, no)


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
        ("'' = 1", "name of a field is empty"),
        (f"a = {'9' * 5000}", "an integer of 5000 digits"),
        ("a < (1, 2)", "expected a value"),
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
        filter_sql.to_sql(filters.parse(text))


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
    marked, values = filter_sql.to_sql(condition)
    with sqlite3.connect(":memory:") as database:
        filter_sql.register_functions(database)
        for x in (0, 3, 1099, 5000, "a", True, None):
            answer = database.execute(f"SELECT {marked} FROM (SELECT ? AS metadata)", [*values, json.dumps({"x": x})])
            assert bool(answer.fetchone()[0]) == filter_matching.matches(condition, {"x": x})


def test_largest_integer_matches() -> None:
    assert filter_matching.matches(filters.parse(f"m = {2**63 - 1}"), {"m": 2**63 - 1})


@pytest.mark.parametrize("name", ["a\0b", 'a"b', "a\\b", "a\nb"])
def test_any_key_can_be_a_field(name: str) -> None:
    assert filter_matching.matches(Compare((name,), "=", (1,)), {name: 1})
    with pytest.raises(FilterError, match="name of a field is empty"):
        filter_sql.to_sql(Compare(("",), "=", (1,)))


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("a.b = 1", [{"a.b": 1}, {"a": {"b": 1}}, {"a.b": 1, "a": {"b": 2}}], [{"a.b": 2, "a": {"b": 1}}, {"a": 1}]),
        ("d = 2020-05-01", [{"d": "2020-05-01T00:00:00Z"}, {"d": "2020-05-01T02:00+02:00"}], [{"d": "2020-05-02"}]),
        ('d < "2020-05-01T12:00:00+02:00"', [{"d": "2020-05-01T09:59:59.999Z"}], [{"d": "2020-05-01T10:00:00Z"}]),
        ("d > 2020-05-01T00:00:00.1", [{"d": "2020-05-01T00:00:00.12"}], [{"d": "2020-05-01T00:00:00.1000"}]),
        ("d >= 2020", [{"d": 2020}], [{"d": "2020-05-01"}]),
        ("n = 18446744073709551617", [{"n": 2**64 + 1}], [{"n": 2**64}, {"n": float(2**64)}]),
        ("n > 18446744073709551616", [{"n": 2**64 + 1}, {"n": 1e30}], [{"n": 2**64}, {"n": 5}]),
        ("tags = (a, b)", [{"tags": ["a", "B"]}], [{"tags": ["b", "a"]}, {"tags": ["a"]}, {"tags": "a"}]),
        ("tags = ()", [{"tags": []}], [{"tags": None}, {}]),
        ("tags != (1)", [{"tags": [True]}, {"tags": 1}], [{"tags": [1]}]),
        ("lang = DE", [{"lang": "de"}, {"lang": "ＤＥ"}], [{"lang": "den"}]),
        ("name contains STRASSE", [{"name": "Lange Straße"}], [{"name": "Gasse"}]),
        ("tags contains É", [{"tags": ["e\u0301"]}], [{"tags": ["e"]}]),
    ],
)
def test_values_are_compared_as_their_readers_mean_them(text: str, yes: list[dict], no: list[dict], create) -> None:
    condition = filters.parse(text)
    index = create(kind="bm25")
    documents = [*yes, *no]
    index.add([{"id": str(i), "text": "x", "metadata": m} for i, m in enumerate(documents)])
    assert [filter_matching.matches(condition, m) for m in documents] == [True] * len(yes) + [False] * len(no)
    assert [d.id for d in index.select(text)] == [str(i) for i in range(len(yes))]


def test_stored_dates_and_sets_are_accepted(create) -> None:
    index = create(kind="bm25")
    moment = datetime.datetime(2020, 5, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    metadata = {"day": datetime.date(2020, 5, 1), "at": moment, "tags": {"b", "a"}}
    index.add([{"id": "a", "text": "x", "metadata": metadata}])
    for text in ("day = 2020-05-01", "at = 2020-05-01T10:00:00Z", "tags = (a, b)", "at < 2020-05-02"):
        assert index.count(text) == 1, text


@settings(max_examples=300, deadline=None)
@given(a=st.datetimes(timezones=st.timezones()), b=st.datetimes(timezones=st.timezones()))
def test_instants_are_ordered_as_datetimes(a: datetime.datetime, b: datetime.datetime) -> None:
    first, second = filter_matching.instant(a.isoformat()), filter_matching.instant(b.isoformat())
    if first is None or second is None:  # an offset with seconds, as some zones had before 1900
        return
    try:
        difference = a - b
    except OverflowError:
        return
    assert (first < second, first == second) == (difference < datetime.timedelta(0), not difference)
