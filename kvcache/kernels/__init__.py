"""C++ and Triton kernels over vLLM's paged KV cache."""
