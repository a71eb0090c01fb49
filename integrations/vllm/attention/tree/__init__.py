"""Tree-attention backends for verifying draft trees."""
