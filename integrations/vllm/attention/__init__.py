"""Attention backends that serve KV policies and tree verification."""
