"""Softmax attention in float64: the reference for kernel tests and for self-tests at start-up.

The references of the methods themselves are in their files: ``plugins/tidal_decode.py`` and
``plugins/razor_attention.py``.
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def attention(query: NDArray, keys: NDArray, values: NDArray, scale: float) -> tuple[Float64, Float64]:
    """Compute the attention of one query token.

    Args:
        query: [num_heads, head_size].
        keys: [context, num_kv_heads, head_size].
        values: [context, num_kv_heads, head_size].
        scale: Softmax scale.

    Returns:
        The scaled query-key products [num_heads, context], and the output [num_heads, head_size].
    """
    num_queries_per_kv = query.shape[0] // keys.shape[1]
    wide_keys = np.repeat(keys.astype(np.float64), num_queries_per_kv, axis=1)
    wide_values = np.repeat(values.astype(np.float64), num_queries_per_kv, axis=1)
    logits = np.einsum("hd,nhd->hn", query.astype(np.float64), wide_keys) * scale
    return logits, np.einsum("hn,nhd->hd", softmax(logits), wide_values)


def softmax(logits: NDArray) -> Float64:
    """Return the softmax over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
