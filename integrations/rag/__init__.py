"""Answers from an index and a language model: `Answerer` in Python, `pilotfish rag` on the command line."""

from .answering import Answerer

__all__ = ["Answerer"]
