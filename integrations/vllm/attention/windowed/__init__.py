"""Attention backends with one KV cache per head, most of which keep only a window (RazorAttention)."""
