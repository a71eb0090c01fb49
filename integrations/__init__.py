"""Where Pilotfish meets other software; only ``integrations.vllm`` imports vLLM."""
