"""Shared parts of KV policies: plans of what a decode step reads, profiles, and kernels over the paged KV cache."""
