"""Use an index as Haystack's document store, with a retriever in a pipeline. Needs pilotfish[retrieval,haystack]."""

import tempfile

from haystack import Document, Pipeline

from pilotfish.integrations.haystack import PilotfishDocumentStore, PilotfishRetriever

DOCUMENTS = [
    Document(id="remora", content="A remora holds on to sharks with a disc on its head.", meta={"year": 2019}),
    Document(id="pilot", content="Pilot fish swim in front of sharks and eat parasites.", meta={"year": 2021}),
    Document(id="bread", content="Bread rises because yeast makes gas.", meta={"year": 2022}),
]

with tempfile.TemporaryDirectory() as folder:
    store = PilotfishDocumentStore(f"{folder}/index")
    store.write_documents(DOCUMENTS)
    pipeline = Pipeline()
    pipeline.add_component("retriever", PilotfishRetriever(store, top_k=2))
    filters = {"field": "meta.year", "operator": ">=", "value": 2020}
    results = pipeline.run({"retriever": {"query": "Which fish clean sharks?", "filters": filters}})
    for document in results["retriever"]["documents"]:
        print(document.id, f"{document.score:.3f}", document.content)
