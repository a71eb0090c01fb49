"""Compiled kernels over vLLM's paged KV cache."""
