"""Sparse attention backends: layers that read selected tokens only (TidalDecode)."""
