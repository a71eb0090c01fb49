"""Integrations with other software; only ``integrations.vllm`` imports vLLM."""
