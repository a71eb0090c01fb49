"""Tests of suffix arrays and the datastore against naive search, and of errors on damaged or existing files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.drafting import suffix_array, suffix_search
from pilotfish.plugins.drafting.datastore import Datastore, DatastoreError, build_datastore
from pilotfish.plugins.drafting.suffix_array import SUFFIX_DEPTH, TEXT_BREAK

texts = st.lists(st.lists(st.integers(0, 3), max_size=60), min_size=1, max_size=5)


def joined(parts: list[list[int]]) -> np.ndarray:
    return np.array([t for part in parts for t in [*part, TEXT_BREAK]], np.int32)


@given(texts)
def test_suffix_array_matches_naive_sort(parts: list[list[int]]) -> None:
    tokens = joined(parts)
    expected = sorted(range(len(tokens)), key=lambda i: (tokens[i : i + SUFFIX_DEPTH].tolist(), i))
    assert suffix_array.build_suffix_array(tokens).tolist() == expected


@settings(max_examples=200, deadline=None)  # compiles
@given(texts, st.lists(st.integers(0, 3), max_size=30), st.integers(1, SUFFIX_DEPTH), st.integers(1, 4))
def test_longest_suffix_search_matches_naive_search(
    parts: list[list[int]], tail: list[int], longest: int, shortest: int
) -> None:
    tokens = joined(parts)
    order = suffix_array.build_suffix_array(tokens)
    match = suffix_search.find_longest_suffix(tokens, order, np.array(tail, np.int32), longest, shortest)
    expected: tuple[int, list[int]] = (0, [])
    for length in range(shortest, min(longest, len(tail)) + 1):
        positions = [i for i in range(len(tokens)) if tokens[i : i + length].tolist() == tail[-length:]]
        if positions:
            expected = length, positions
    assert (match.length, sorted(order[match.begin : match.end].tolist())) == expected
    followers = suffix_search.continuations(tokens, order, match, 5, 1000)
    assert len(followers) == match.occurrences
    for row, position in zip(followers.tolist(), order[match.begin : match.end].tolist(), strict=True):
        after = tokens[position + match.length :].tolist()
        after = after[: after.index(TEXT_BREAK)][:5]
        assert row == [*after, *[-1] * (5 - len(after))]


def test_many_occurrences_are_sampled_evenly() -> None:
    tokens = joined([[1, 2, i] for i in range(10)] + [[1, 2, 7]] * 90)
    order = suffix_array.build_suffix_array(tokens)
    match = suffix_search.find_longest_suffix(tokens, order, np.array([1, 2], np.int32))
    assert (match.length, match.occurrences) == (2, 100)
    sampled = suffix_search.continuations(tokens, order, match, 1, 20)[:, 0].tolist()
    assert len(sampled) == 20
    assert sampled.count(7) >= 17


def test_datastore_round_trip(tmp_path: Path) -> None:
    info = build_datastore(tmp_path / "store", [[5, 6, 7], [], [5, 6, 9]], "name", "print", 100)
    assert (info.texts, info.tokens) == (2, 8), "an empty text is not counted"
    store = Datastore(tmp_path / "store", verify=True)
    assert store.info == info
    match = store.find_longest_suffix(np.array([4, 5, 6], np.int32))
    assert (match.length, match.occurrences) == (2, 2)
    assert sorted(store.continuations(match, 1, 10)[:, 0].tolist()) == [7, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"], "temporary files were left"


def test_number_of_tokens_is_bounded(tmp_path: Path) -> None:
    assert build_datastore(tmp_path / "store", [[1] * 50] * 10, "name", "print", 60).tokens == 60


def test_replaced_datastore_stays_readable_while_open(tmp_path: Path) -> None:
    build_datastore(tmp_path / "store", [[1, 2, 3]], "name", "print", 100)
    old = Datastore(tmp_path / "store")
    build_datastore(tmp_path / "store", [[4, 5, 6, 7]], "name", "print", 100)
    assert old.tokens.tolist() == [1, 2, 3, TEXT_BREAK]
    assert Datastore(tmp_path / "store").tokens.tolist() == [4, 5, 6, 7, TEXT_BREAK]


def test_failed_build_writes_nothing(tmp_path: Path) -> None:
    def breaks():
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_datastore(tmp_path / "store", breaks(), "name", "print", 100)
    with pytest.raises(DatastoreError, match="contain no tokens"):
        build_datastore(tmp_path / "store", [], "name", "print", 100)
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_overwrite_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DatastoreError, match="exists, and is no datastore"):
            build_datastore(path, [[1, 2]], "name", "print", 100)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_refuses_damaged_datastore(tmp_path: Path) -> None:
    store = tmp_path / "store"
    build_datastore(store, [[1, 2, 3]], "name", "print", 100)
    content = (store / "order.npy").read_bytes()
    (store / "order.npy").write_bytes(content[:-1] + b"\7")
    Datastore(store)
    with pytest.raises(DatastoreError, match=r"order\.npy is damaged"):
        Datastore(store, verify=True)
    (store / "order.npy").write_bytes(content[:-4])
    with pytest.raises(DatastoreError, match=r"order\.npy"):
        Datastore(store)
    info = json.loads((store / "datastore.json").read_text())
    (store / "datastore.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(DatastoreError, match="of version 99"):
        Datastore(store)
    (store / "datastore.json").write_text("{")
    with pytest.raises(DatastoreError, match="cannot be read"):
        Datastore(store)
    with pytest.raises(DatastoreError, match="not a datastore"):
        Datastore(tmp_path / "none")
