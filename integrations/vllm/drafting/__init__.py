"""Speculative decoding in vLLM with our drafters."""
