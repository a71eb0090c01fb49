"""Token importance in a layer: page rank over its attention (AIM, arXiv 2412.03248, section 3.3)."""

import torch
from torch import Tensor


def page_rank(query: Tensor, key: Tensor, scale: float, temperature: float, iterations: int) -> Tensor:
    """Compute the page rank of each token over the attention matrix, without damping.

    Per head a uniform distribution is multiplied by the attention matrix ``iterations`` times; heads are combined by
    the root mean square. In float32 most values underflow to 0 and ties decide, so float64 is used.

    Args:
        query: [n, num_heads, head_size] of one prompt, with positions.
        key: [n, num_kv_heads, head_size].
        scale: Softmax scale.
        temperature: Additional divisor of the logits.
        iterations: Number of multiplications.

    Returns:
        [n] float64.
    """
    n, heads, _ = query.shape
    group = heads // key.shape[1]
    future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    squares = torch.zeros(n, dtype=torch.float64, device=query.device)
    for head in range(heads):  # one at a time: each needs an n * n matrix
        logits = query[:, head].double() @ key[:, head // group].double().T
        attention = (logits * (scale / temperature)).masked_fill_(future, -torch.inf).softmax(-1)
        rank = torch.full((n,), 1 / n, dtype=torch.float64, device=query.device)
        for _ in range(iterations):
            rank = rank @ attention
        squares += rank**2
    return (squares / heads).sqrt()


def keep_visual_tokens(importance: Tensor, visual: Tensor, count: int) -> Tensor:
    """Return a mask of all text tokens and the most important visual tokens; of equals the earlier.

    Args:
        importance: [n] importance of each token.
        visual: [n] bool, whether each token is visual.
        count: Number of visual tokens to keep.

    Returns:
        [n] bool mask.
    """
    keep = ~visual
    indices = visual.nonzero().flatten()
    order = torch.sort(importance[indices], descending=True, stable=True).indices
    keep[indices[order[:count]]] = True
    return keep
