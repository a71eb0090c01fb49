"""Commands for vLLM."""
