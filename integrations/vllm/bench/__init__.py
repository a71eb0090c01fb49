"""Benchmarks that compare vLLM with and without plugins."""
