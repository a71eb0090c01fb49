"""Attention backends with one KV cache per head, most of them windowed (RazorAttention)."""
