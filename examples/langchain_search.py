"""Use an index as LangChain's vector store: add, filter, retrieve. Needs pilotfish[retrieval,langchain]."""

import tempfile

from langchain_core.documents import Document

from pilotfish.integrations.langchain import PilotfishVectorStore

DOCUMENTS = [
    Document(id="remora", page_content="A remora holds on to sharks with a disc on its head.", metadata={"year": 2019}),
    Document(id="pilot", page_content="Pilot fish swim in front of sharks and eat parasites.", metadata={"year": 2021}),
    Document(id="bread", page_content="Bread rises because yeast makes gas.", metadata={"year": 2022}),
]

with tempfile.TemporaryDirectory() as folder:
    store = PilotfishVectorStore(f"{folder}/index")
    store.add_documents(DOCUMENTS)
    retriever = store.as_retriever(search_kwargs={"k": 2, "filter": {"year": {"$gte": 2020}}})
    for document in retriever.invoke("Which fish clean sharks?"):
        print(document.id, document.page_content)
