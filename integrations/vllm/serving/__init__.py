"""Composition of ``vllm serve`` commands, and `pilotfish doctor`."""
