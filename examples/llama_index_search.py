"""Use an index as a LlamaIndex retriever, and re-rank nodes by MaxSim. Needs pilotfish[retrieval,llama-index]."""

import tempfile

from llama_index.core.schema import TextNode

from pilotfish.integrations.llama_index import PilotfishRerank, PilotfishRetriever

NODES = [
    TextNode(id_="remora", text="A remora holds on to sharks with a disc on its head.", metadata={"year": 2019}),
    TextNode(id_="pilot", text="Pilot fish swim in front of sharks and eat parasites.", metadata={"year": 2021}),
    TextNode(id_="bread", text="Bread rises because yeast makes gas.", metadata={"year": 2022}),
]
QUESTION = "Which fish clean sharks?"

with tempfile.TemporaryDirectory() as folder:
    retriever = PilotfishRetriever(f"{folder}/index", top_k=3, filters="year >= 2019", kind="hybrid")
    retriever.add(NODES)
    for node in PilotfishRerank(top_n=2).postprocess_nodes(retriever.retrieve(QUESTION), query_str=QUESTION):
        print(node.node_id, f"{node.score:.3f}", node.text)
