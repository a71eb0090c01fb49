"""The retriever and the reranker for LlamaIndex."""

import asyncio
import base64
from pathlib import Path

import pytest
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    Node,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from pilotfish.integrations.llama_index import PilotfishRerank, PilotfishRetriever
from pilotfish.integrations.llama_index.filters import to_pilotfish_filter
from pilotfish.retrieval import RetrievalError, filter_matching

NODES = [
    TextNode(id_="a", text="Sharks have many teeth.", metadata={"year": 2019, "tags": ["sea", "teeth"]}),
    TextNode(id_="b", text="Pilot fish travel with sharks.", metadata={"year": 2020, "tags": ["sea"]}),
    TextNode(id_="c", text="Bread is baked in ovens.", metadata={"year": 2021}),
]


@pytest.fixture
def retriever(tmp_path: Path) -> PilotfishRetriever:
    """Return a retriever with the nodes of ``NODES``."""
    created = PilotfishRetriever(tmp_path / "index", top_k=2)
    assert created.add(NODES) == ["a", "b", "c"]
    return created


def test_add_retrieve_and_delete_nodes(retriever: PilotfishRetriever) -> None:
    results = retriever.retrieve("which fish follow sharks?")
    assert [n.node.node_id for n in results] == ["b", "a"]
    assert results[0].node.metadata == NODES[1].metadata
    assert results[0].score is not None and results[1].score is not None and results[0].score > results[1].score
    assert asyncio.run(retriever.aretrieve("bread"))[0].node.node_id == "c"
    retriever.add([TextNode(id_="b", text="Whales sing.")])
    assert retriever.retrieve("whales")[0].node.get_content() == "Whales sing."
    retriever.delete(["b"])
    assert "b" not in {n.node.node_id for n in retriever.retrieve("whales")}


def test_node_fields_are_preserved(retriever: PilotfishRetriever) -> None:
    node = TextNode(id_="n", text="Rays glide.", metadata={"year": 1}, start_char_idx=3, end_char_idx=14)
    node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="source", metadata={"of": "rays"})
    node.excluded_llm_metadata_keys = ["year"]
    retriever.add([node])
    result = retriever.retrieve("rays glide")[0].node
    assert isinstance(result, TextNode)
    assert result.ref_doc_id == "source" and result.relationships == node.relationships
    assert (result.metadata, result.excluded_llm_metadata_keys) == ({"year": 1}, ["year"])
    assert (result.start_char_idx, result.end_char_idx) == (3, 14)
    with pytest.raises(RetrievalError, match="key _llama_index is reserved"):
        retriever.add([TextNode(id_="x", text="x", metadata={"_llama_index": 1})])


@pytest.mark.parametrize(
    ("one", "ids"),
    [
        (MetadataFilter(key="year", value=2020), {"b"}),
        (MetadataFilter(key="year", value=2020, operator=FilterOperator.GTE), {"b", "c"}),
        (MetadataFilter(key="year", value=[2019, 2021], operator=FilterOperator.IN), {"a", "c"}),
        (MetadataFilter(key="year", value=[2019], operator=FilterOperator.NIN), {"b", "c"}),
        (MetadataFilter(key="year", value=2019, operator=FilterOperator.NE), {"b", "c"}),
        (MetadataFilter(key="tags", value="teeth", operator=FilterOperator.CONTAINS), {"a"}),
        (MetadataFilter(key="tags", value=["sea", "teeth"], operator=FilterOperator.ALL), {"a"}),
        (MetadataFilter(key="tags", value=["land", "sea"], operator=FilterOperator.ANY), {"a", "b"}),
        (MetadataFilter(key="tags", value=None, operator=FilterOperator.IS_EMPTY), {"c"}),
    ],
)
def test_filters(one: MetadataFilter, ids: set[str]) -> None:
    translated = to_pilotfish_filter(MetadataFilters(filters=[one]))
    assert translated is not None and not isinstance(translated, str)
    assert {n.node_id for n in NODES if filter_matching.matches(translated, n.metadata)} == ids
    negated = to_pilotfish_filter(MetadataFilters(filters=[one], condition=FilterCondition.NOT))
    assert negated is not None and not isinstance(negated, str)
    assert {n.node_id for n in NODES if filter_matching.matches(negated, n.metadata)} == {"a", "b", "c"} - ids


def test_text_matches_ignore_case_and_no_filter_is_none(retriever: PilotfishRetriever) -> None:
    for operator in (FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE):
        retriever.filters = MetadataFilters(filters=[MetadataFilter(key="tags", value="TEETH", operator=operator)])
        assert [n.node.node_id for n in retriever.retrieve("fish")] == ["a"]
    assert to_pilotfish_filter(MetadataFilters(filters=[])) is None


def test_reranking_sorts_by_similarity(retriever: PilotfishRetriever) -> None:
    nodes = [NodeWithScore(node=n, score=0.0) for n in reversed(NODES)]
    rerank = PilotfishRerank(top_n=2)
    best = rerank.postprocess_nodes(nodes, query_str="which fish follow sharks?")
    assert [n.node.node_id for n in best] == ["b", "a"]
    query, document = (
        rerank._encoder.encode_documents([t])[0].vectors for t in ("which fish follow sharks?", NODES[1].text)
    )
    products = [max(float(q @ d) for d in document) for q in query]
    assert best[0].score == pytest.approx(sum(products) / len(products), abs=1e-3)
    again = asyncio.run(rerank.apostprocess_nodes(nodes, QueryBundle("bread ovens")))
    assert again[0].node.node_id == "c"
    assert rerank.postprocess_nodes([], query_str="x") == []
    with pytest.raises(RetrievalError, match="needs a query"):
        rerank.postprocess_nodes(nodes)


def test_query_engine_uses_retriever_and_reranker(retriever: PilotfishRetriever) -> None:
    from llama_index.core.llms import MockLLM

    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM(), node_postprocessors=[PilotfishRerank(top_n=1)])
    answer = engine.query("which fish follow sharks?")
    assert [n.node.node_id for n in answer.source_nodes] == ["b"]
    assert "Pilot fish travel" in str(answer)


EVERY_TYPE = [
    TextNode(id_="text", text="alpha", metadata={"z": 1, "a": {"y": 2, "b": [1]}}),
    IndexNode(id_="index", text="alpha", index_id="other", metadata={"z": 1, "a": 2}),
    ImageNode(id_="image", text="alpha", image_url="http://host/i.png", image_mimetype="image/png"),
    Node(id_="node", text_resource=MediaResource(text="alpha", mimetype="text/markdown"), metadata={"b": 1, "a": 2}),
    Document(id_="document", text="alpha", metadata={"b": 1, "a": 2}),
    ImageDocument(id_="picture", text="alpha", image=base64.b64encode(b"picture").decode(), image_mimetype="image/png"),
]


@pytest.mark.parametrize("node", EVERY_TYPE, ids=lambda node: node.class_name())
def test_every_type_of_node_returns_as_itself(tmp_path: Path, node: BaseNode) -> None:
    node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="source", metadata={"b": 1, "a": 2})
    node.relationships[NodeRelationship.CHILD] = [RelatedNodeInfo(node_id="c1"), RelatedNodeInfo(node_id="c2")]
    retriever = PilotfishRetriever(tmp_path / "index", kind="bm25")
    retriever.add([node])
    result = retriever.retrieve("alpha")[0].node
    assert type(result) is type(node)
    assert result.hash == node.hash
    assert list(result.metadata) == list(node.metadata)
    assert result.model_dump() == node.model_dump()


def test_fusion_counts_a_node_once(retriever: PilotfishRetriever, tmp_path: Path) -> None:
    from llama_index.core.llms import MockLLM
    from llama_index.core.retrievers import QueryFusionRetriever

    other = PilotfishRetriever(tmp_path / "other", kind="bm25")
    other.add(NODES)
    fused = QueryFusionRetriever([retriever, other], llm=MockLLM(), num_queries=1, similarity_top_k=5, use_async=False)
    found = [n.node.node_id for n in fused.retrieve("sharks teeth")]
    assert len(found) == len(set(found)) and "a" in found
