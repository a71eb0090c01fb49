"""Which tokens of a prompt matter to a layer: AIM's page rank over its attention (arXiv 2412.03248, section 3.3)."""

import torch
from torch import Tensor


def page_rank(query: Tensor, key: Tensor, scale: float, temperature: float, iterations: int) -> Tensor:
    """How often a walk along attention ends at each token.

    Per head a walk begins anywhere and goes from a token to those that it attends to, a few times, without damping;
    heads are joined by the root of the mean square. In float64: in float32 most tokens come out as exactly 0, and ties
    decide.

    Args:
        query: [n, heads, head_size] of one prompt, with positions.
        key: [n, kv_heads, head_size].
        scale: Of the logits.
        temperature: By which the logits are divided besides.
        iterations: Steps of the walk.

    Returns:
        [n] float64.
    """
    n, heads, _ = query.shape
    group = heads // key.shape[1]
    later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    squares = torch.zeros(n, dtype=torch.float64, device=query.device)
    for head in range(heads):  # one at a time: n * n numbers
        logits = query[:, head].double() @ key[:, head // group].double().T
        steps = (logits * (scale / temperature)).masked_fill_(later, -torch.inf).softmax(-1)
        at = torch.full((n,), 1 / n, dtype=torch.float64, device=query.device)
        for _ in range(iterations):
            at = at @ steps
        squares += at**2
    return (squares / heads).sqrt()


def keep_visual_tokens(importance: Tensor, visual: Tensor, count: int) -> Tensor:
    """[n] bool: all text, and the ``count`` visual tokens that matter most; of equal ones the earlier."""
    keep = ~visual
    places = visual.nonzero().flatten()
    order = torch.sort(importance[places], descending=True, stable=True).indices
    keep[places[order[:count]]] = True
    return keep
