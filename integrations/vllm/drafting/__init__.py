"""Speculative decoding in vLLM: attachments for drafters, and what they share."""
