"""What all measurements share, and the measurement of retrieval; those of engines are in `vllm.bench`."""
