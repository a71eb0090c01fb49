"""Drafters on vLLM's V1 model runner, attached as a ``custom_class`` proposer."""
