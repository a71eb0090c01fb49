"""Retrieval-augmented generation: `answering.Answerer` in Python, and `pilotfish rag` on the command line."""
