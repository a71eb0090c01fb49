"""Code shared by all benchmarks, and the retrieval benchmark; benchmarks of engines are in `vllm.bench`."""
