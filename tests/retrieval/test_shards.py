"""Tests that sharded indexes return the same documents and scores as one index, in the same order."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import Index, RetrievalError, shards
from pilotfish.retrieval.shards import ShardedIndex

RNG = np.random.default_rng(0)
NAMES = [f"word{i}" for i in range(60)]
DOCUMENTS = [{"id": str(i), "text": " ".join(RNG.choice(NAMES, 8).tolist()), "metadata": {"n": i}} for i in range(300)]
OPTIONS = {"dimension": 0, "nlist": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an index and a folder of three shards with the same documents."""
    words.use()
    base = tmp_path_factory.mktemp("shards")
    with Index.create(base / "one", encoder="words", options=OPTIONS) as one:
        one.add(DOCUMENTS)
    assert shards.build_shards(base / "three", DOCUMENTS, 3, encoder="words", options=OPTIONS) == 300
    return base / "one", base / "three"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    query=st.lists(st.sampled_from([*NAMES, "other"]), min_size=1, max_size=5).map(" ".join),
    k=st.integers(1, 30),
    least=st.one_of(st.none(), st.sampled_from([0, 150, 295, 400])),
    nprobe=st.integers(1, 12),
    t_prime=st.integers(1, 500),
)
def test_sharded_search_matches_one_index(folders, query, k, least, nprobe, t_prime) -> None:
    where = None if least is None else f"n >= {least}"
    one, three = Index.open(folders[0]), ShardedIndex(folders[1])
    a, b = (x.search(query, k, where, nprobe=nprobe, t_prime=t_prime) for x in (one, three))
    assert [(h.id, h.score) for h in a] == [(h.id, h.score) for h in b]
    one.close()


def test_sharded_vdr_search_matches_one_index(tmp_path: Path) -> None:
    words.use()
    with Index.create(tmp_path / "one", "vdr", "word-weights") as one:
        one.add(DOCUMENTS)
        shards.build_shards(tmp_path / "three", DOCUMENTS, 3, "vdr", "word-weights")
        three = ShardedIndex(tmp_path / "three")
        for query in ("word1 word2 word3", "word59", "2drow"):
            answers = [[(h.id, h.score) for h in x.search(query, 20)] for x in (one, three)]
            assert answers[0] == answers[1]
        with pytest.raises(RetrievalError, match="rerank needs all documents"):
            three.search("word1", rerank=10)
    for kind in ("bm25", "hybrid"):
        with pytest.raises(RetrievalError, match=f"{kind} cannot be in shards"):
            shards.build_shards(tmp_path / kind, DOCUMENTS, 2, kind)
        assert not (tmp_path / kind).exists()


def test_refuses_searches_that_shards_do_not_support(folders, tmp_path: Path) -> None:
    three = ShardedIndex(folders[1])
    assert len(three) == 300
    with pytest.raises(RetrievalError, match="use warp with shards"):
        three.search("word1", impute="kprime")
    with pytest.raises(RetrievalError, match="there are no shards"):
        ShardedIndex(folders[0])
    for documents, message in (([], "no documents"), ([DOCUMENTS[0]] * 2, "the same id")):
        with pytest.raises(RetrievalError, match=message):
            shards.build_shards(tmp_path / "x", documents, 2, encoder="words")
    (folders[1] / "shards.json").rename(tmp_path / "kept")
    (folders[1] / "shards.json").write_text("{")
    with pytest.raises(RetrievalError, match="is damaged"):
        ShardedIndex(folders[1])
    (tmp_path / "kept").rename(folders[1] / "shards.json")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_shards_on_ray_match_one_index(tmp_path: Path) -> None:
    """Test building and searching with two Ray workers and the embedded encoder, which workers can load."""
    import ray

    documents = [{"id": str(i), "text": f"Item {i} is about {NAMES[i % 60]} and {NAMES[i % 7]}."} for i in range(60)]
    shards.connect_shards("local")
    try:
        shards.build_shards(tmp_path / "two", documents, 2, ray_address="local")
        with Index.create(tmp_path / "one") as one:
            one.add(documents)
            two = ShardedIndex(tmp_path / "two", "local")
            for query in ("item about word3", "word59"):
                assert [(h.id, h.score) for h in one.search(query)] == [(h.id, h.score) for h in two.search(query)]
    finally:
        ray.shutdown()
