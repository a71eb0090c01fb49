"""Shared parts of drafters and the engine: draft trees, adjacency rows, token suffix indexes and draft lengths."""
