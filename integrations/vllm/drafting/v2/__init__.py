"""Drafters on vLLM's V2 model runner, attached as a speculator whose state and drafts stay on the device."""
