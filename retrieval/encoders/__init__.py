"""Text encoders: multi-vector, learned sparse (VDR, SPLADE), and stems for BM25."""

from .multi_vector import MINILM, MultiVectorEncoder, load_multi_vector_encoder

__all__ = ["MINILM", "MultiVectorEncoder", "load_multi_vector_encoder"]
