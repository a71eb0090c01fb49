"""Test that a filter selects the same documents through the command line, Python, HTTP and the three frameworks."""

import datetime
import json
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import words
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from pilotfish.integrations.haystack import PilotfishDocumentStore
from pilotfish.integrations.langchain import PilotfishVectorStore
from pilotfish.integrations.llama_index import PilotfishRetriever
from pilotfish.retrieval import Index
from pilotfish.retrieval.server import create_index_app

METADATA: list[dict[str, Any]] = [
    {},
    {"lang": "de", "year": 2020, "tags": ["a", "b"]},
    {"lang": "DE", "year": 2020.5, "tags": ["A", "B"]},
    {"lang": "ｄｅ", "year": 2**53 + 1, "tags": ["b", "a"]},
    {"lang": "Straße", "year": 2**64 + 1, "tags": []},
    {"lang": "a\0b", "year": -(2**70), "tags": [1, 2]},
    {"lang": "2020", "year": "2020", "tags": "a"},
    {"at": "2020-05-01", "x.y": 1, "x": {"y": 2}},
    {"at": "2020-05-01T00:00:00Z", "x": {"y": 1}},
    {"at": "2020-05-01T02:00:00.25+02:00", "x.y": 2},
    {"at": "2020-04-30T23:59:59.999999-00:30", "x": {"y": {"z": 1}}},
    {"at": "2020-13-01", "x": 1},
]
TEXTS = ["de", "De", "STRASSE", "a\0b", "a", "2020", 'quo"te', "back\\slash"]
NUMBERS = [1, 2, 2020, 2020.5, 2**53, 2**53 + 1, 2**64, 2**64 + 1, float(2**64), -(2**70), 0.1]
DATES = ["2020-05-01", "2020-05-01T00:00:00+00:00", "2020-05-01T00:00:00.25Z", "2020-05-01T00:00:00.3", "2020-04-30"]
WHOLE = [1, 2, 2020, 2**64 + 1]
SCALARS = st.sampled_from([*TEXTS, *NUMBERS, *DATES])
LISTS = st.sampled_from([["a", "b"], ["A", "b"], ["b"], [1, 2], [1.0, 2.0]])
FIELDS = st.sampled_from(["lang", "year", "tags", "at", "x.y", "nothing"])
LEAVES = st.one_of(
    st.tuples(FIELDS, st.sampled_from(["=", "!="]), st.one_of(SCALARS, LISTS)),
    st.tuples(FIELDS, st.sampled_from(["<", "<=", ">", ">="]), st.sampled_from([*NUMBERS, *DATES])),
    st.tuples(
        FIELDS,
        st.sampled_from(["in", "not in"]),
        st.one_of(
            *(st.lists(st.sampled_from(v), min_size=1, max_size=3) for v in (TEXTS, [1, 2, 2020, 2**64 + 1], DATES))
        ),
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.tuples(st.sampled_from(["AND", "OR", "NOT"]), st.lists(inner, min_size=1, max_size=2)),
    max_leaves=4,
)
Tree = tuple[Any, ...]


# ------------------------------------------------------------------------------------------------------------- oracle


def holds(tree: Tree, metadata: dict[str, Any]) -> bool:
    if len(tree) == 2:
        parts = [holds(part, metadata) for part in tree[1]]
        return {"AND": all(parts), "OR": any(parts), "NOT": not all(parts)}[tree[0]]
    name, operator, value = tree
    found = metadata.get(name)
    if name not in metadata and "." in name:
        outer, inner = name.split(".")
        parent = metadata.get(outer)
        found = parent.get(inner) if isinstance(parent, dict) else None
    match operator:
        case "=" | "!=":
            return same(found, value) == (operator == "=")
        case "in" | "not in":
            return any(same(found, v) for v in value) == (operator == "in")
    a, b = key(found), key(value)
    if isinstance(found, str) and isinstance(value, str) and type(a) is not type(b):
        a, b = folded(found), folded(value)  # a date and another text
    if a is None or b is None or type(a) is not type(b):
        return False
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[operator]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    x, y = key(a), key(b)
    return x is not None and type(x) is type(y) and x == y


def key(value: Any) -> Any:
    """Return a number as a decimal, a date as a tuple, another text as folded text."""
    if isinstance(value, int | float):
        return Decimal(value)
    if not isinstance(value, str):
        return None
    try:
        fraction = re.search(r"\.(\d+)", value)
        moment = datetime.datetime.fromisoformat(re.sub(r"\.\d+", "", value))
        moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return moment.astimezone(datetime.UTC), Decimal("0." + (fraction[1] if fraction else "0"))
    except ValueError:
        return folded(value)


def folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


# ------------------------------------------------------------------------------------------------------- translations


def to_text(tree: Tree) -> str:
    if len(tree) == 2:
        parts = [f"({to_text(part)})" for part in tree[1]]
        return f"NOT ({' AND '.join(parts)})" if tree[0] == "NOT" else f" {tree[0]} ".join(parts)
    name, operator, value = tree
    return f"{name} {operator} {literal(value)}"


def literal(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(literal, value))})"
    return repr(value) if not isinstance(value, str) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def to_langchain(tree: Tree) -> dict[str, Any]:
    if len(tree) == 2:
        parts = [to_langchain(part) for part in tree[1]]
        return {"$not": {"$and": parts}} if tree[0] == "NOT" else {f"${tree[0].lower()}": parts}
    names = {"=": "$eq", "!=": "$ne", "<": "$lt", "<=": "$lte", ">": "$gt", ">=": "$gte", "in": "$in", "not in": "$nin"}
    return {tree[0]: {names[tree[1]]: tree[2]}}


def to_llama(tree: Tree) -> MetadataFilters:
    if len(tree) == 2:
        return MetadataFilters(filters=[to_llama(p) for p in tree[1]], condition=FilterCondition(tree[0].lower()))
    names = {"=": "==", "not in": "nin"}
    operator = FilterOperator(names.get(tree[1], tree[1]))
    return MetadataFilters(filters=[MetadataFilter(key=tree[0], value=tree[2], operator=operator)])


def to_haystack(tree: Tree) -> dict[str, Any]:
    if len(tree) == 2:
        return {"operator": tree[0], "conditions": [to_haystack(part) for part in tree[1]]}
    return {"field": f"meta.{tree[0]}", "operator": {"=": "=="}.get(tree[1], tree[1]), "value": tree[2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words.use()
    place = tmp_path_factory.mktemp("filters") / "index"
    with Index.create(place, "bm25") as index:
        index.add([{"id": str(i), "text": "common", "metadata": m} for i, m in enumerate(METADATA)])
    return place


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_every_interface_selects_the_same_documents(folder: Path, inside: Callable, tree: Tree) -> None:
    expected = {str(i) for i, metadata in enumerate(METADATA) if holds(tree, metadata)}
    text = to_text(tree)
    with Index.open(folder) as index:
        client = TestClient(create_index_app(index), base_url="http://localhost")
        response = client.post("/search", json={"query": "common", "k": 50, "where": text})
        assert response.status_code == 200, response.text
        assert {h["id"] for h in response.json()["hits"]} == expected, text
        assert {h.id for h in index.search("common", 50, text)} == expected
        assert index.count(text) == len(expected)
    if "\0" not in text:  # an argument of a command cannot contain it
        result = inside("index", "search", str(folder), "common", "-k", "50", "--where", text, "--json")
        assert {hit["id"] for hit in json.loads(result.stdout)["hits"]} == expected, result
    langchain = PilotfishVectorStore(folder)
    assert {d.id for d in langchain.similarity_search("common", 50, to_langchain(tree))} == expected
    llama = PilotfishRetriever(folder, top_k=50, filters=to_llama(tree))
    assert {n.node.node_id for n in llama.retrieve("common")} == expected
    haystack = PilotfishDocumentStore(str(folder))
    assert {d.id for d in haystack.filter_documents(to_haystack(tree))} == expected
