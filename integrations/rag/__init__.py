"""Answers from an index and a language model: `answering.Answerer` in Python, `pilotfish rag` on the command line."""
