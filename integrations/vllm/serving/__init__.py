"""Composing and running ``vllm serve``, and `pilotfish doctor`."""
