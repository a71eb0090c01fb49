"""Side-by-side measurements of vLLM with and without plugins."""
