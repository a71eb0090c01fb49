"""Pilotfish: plugins for a stock vLLM engine, and a retrieval stack beside it."""

__version__ = "0.1.0"
