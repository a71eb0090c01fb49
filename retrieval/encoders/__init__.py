"""Encoders of texts: one vector for each token, from checkpoints on disk; see `multi_vector`."""

from .multi_vector import MINILM, MultiVectorEncoder, load

__all__ = ["MINILM", "MultiVectorEncoder", "load"]
