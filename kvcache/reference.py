"""What the kernels compute, written plainly in float64: the oracle of their tests and of the self-test at start-up."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .selection import PAGE_SIZE, SelectionRule

Float64 = NDArray[np.float64]


def attention(query: NDArray, keys: NDArray, values: NDArray, scale: float) -> tuple[Float64, Float64]:
    """One query token's attention.

    Args:
        query: [heads, size].
        keys: [n, kv_heads, size].
        values: [n, kv_heads, size].
        scale: Of the scores.

    Returns:
        Scores [heads, n], and the output [heads, size].
    """
    share = query.shape[0] // keys.shape[1]
    wide_keys, wide_values = (np.repeat(x.astype(np.float64), share, axis=1) for x in (keys, values))
    scores = np.einsum("hd,nhd->hn", query.astype(np.float64), wide_keys) * scale
    return scores, np.einsum("hn,nhd->hd", softmax(scores), wide_values)


def softmax(scores: NDArray) -> Float64:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def token_scores(scores: NDArray, rule: SelectionRule, kv_heads: int) -> Float64:
    """How much each position matters to each set of heads, [sets, n], from one request's scores [heads, n]."""
    weights = softmax(scores)
    heads = len(scores)
    if rule.head_aggregation == "head":
        return weights
    if rule.head_aggregation == "kv_head":
        return weights.reshape(kv_heads, heads // kv_heads, -1).sum(1)
    if rule.head_aggregation == "max":
        return weights.max(0, keepdims=True)
    if rule.head_aggregation == "union":
        proposals = min(rule.budget - rule.recent, scores.shape[1])
        least = np.sort(weights, 1)[:, -proposals][:, None]
        weights = np.where(weights >= least, weights, 0)
    return weights.sum(0, keepdims=True)


def select_tokens(importance: NDArray, rule: SelectionRule) -> list[int]:
    """Positions kept, ascending, from one set's importance [n]; of equals the earlier is kept."""
    n = len(importance)
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    units = -(-n // unit)
    scores = [importance[u * unit : (u + 1) * unit].sum(dtype=np.float32) for u in range(units)]
    kept = {u for u in range(units) if u * unit < rule.sinks or (u + 1) * unit > n - 1 - rule.recent}
    rest = sorted((u for u in range(units) if u not in kept), key=lambda u: (-scores[u], u))
    kept |= set(rest[: max(0, rule.budget // unit - len(kept))])
    return page_positions(sorted(kept), n, rule)


def page_positions(units: Sequence[int], n: int, rule: SelectionRule) -> list[int]:
    """The positions of pages (or the positions themselves) within a context of ``n``."""
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    return [p for u in units for p in range(u * unit, min(n, (u + 1) * unit))]


def windowed_attention(
    query: NDArray, keys: NDArray, values: NDArray, scale: float, left_out: tuple[int, int], compensation: bool
) -> Float64:
    """One query token's attention without a stretch of positions (RazorAttention, section 3.3).

    Args:
        query: [heads, size], of one KV head.
        keys: [n, size].
        values: [n, size].
        scale: Of the scores.
        left_out: The positions, from and to.
        compensation: Whether their mean key and value stand for them, with their number as weight.

    Returns:
        [heads, size].
    """
    begin, end = left_out
    k, v = (np.delete(x.astype(np.float64), slice(begin, end), axis=0) for x in (keys, values))
    scores = query.astype(np.float64) @ k.T * scale
    if compensation and end > begin:
        mean_key, mean_value = (x[begin:end].astype(np.float64).mean(0) for x in (keys, values))
        extra = query.astype(np.float64) @ mean_key * scale + np.log(end - begin)
        scores, v = np.concatenate([scores, extra[:, None]], 1), np.concatenate([v, mean_value[None]])
    return softmax(scores) @ v
