"""Encoders of texts: one vector for each token, from checkpoints on disk; see `multi_vector`."""

from .multi_vector import MINILM, MultiVectorEncoder, load_multi_vector_encoder

__all__ = ["MINILM", "MultiVectorEncoder", "load_multi_vector_encoder"]
