"""Commands that concern vLLM."""
