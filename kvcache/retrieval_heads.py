"""Which heads look far back: RazorAttention's retrieval heads, found without data (arXiv 2407.15891, section 3.2).

A model reads a block of random tokens four times over. A head that attends to an earlier copy of its token (echo), or
to the token that followed an earlier copy (induction), reaches over the whole text; all others live on what is near.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

COPIES = 4
BLOCK = 2500  # random tokens of a copy; a model with a shorter context takes fewer
ROWS = 256  # query tokens whose attention is held at once

LayerHead = tuple[int, int]  # layer, KV head


def repeated_random_tokens(vocab_size: int, positions: int, seed: int) -> tuple[list[int], int]:
    """Token ids of one start token and `COPIES` equal blocks, and the length of a block.

    Args:
        vocab_size: Of the model.
        positions: The longest text that the model reads.
        seed: Decides the tokens.
    """
    rng = np.random.default_rng(seed)
    period = min(BLOCK, (positions - 1) // COPIES)
    block = rng.integers(0, vocab_size, period)
    return [int(rng.integers(0, vocab_size)), *np.tile(block, COPIES).tolist()], period


def head_scores(query: "Tensor", key: "Tensor", scale: float, period: int) -> "tuple[Tensor, Tensor]":
    """How much each query head of a layer attends to earlier copies, in memory for `ROWS` rows of attention.

    Args:
        query: [n, query_heads, size] of a `sequence`, as they enter attention: rotated, normalised.
        key: [n, kv_heads, size].
        scale: Of the scores.
        period: Length of a block.

    Returns:
        Echo and induction scores, each [query_heads], the mean over the tokens of all copies but the first.
    """
    import torch

    n, heads, _ = query.shape
    q = query.float().transpose(0, 1) * scale  # [query_heads, n, size]
    k = key.float().transpose(0, 1).repeat_interleave(heads // key.shape[1], 0)
    echo, induction = torch.zeros(2, heads)
    for begin in range(1 + period, n, ROWS):
        end = min(n, begin + ROWS)
        x = q[:, begin:end] @ k[:, :end].transpose(1, 2)
        x[:, :, begin:].masked_fill_(torch.ones_like(x[0, :, begin:], dtype=torch.bool).triu(1), float("-inf"))
        total = x.logsumexp(-1)
        for back in range(period, end - 1, period):  # the same token in an earlier copy; column 0 is the start token
            some = slice(max(begin, back + 1), end)
            weights = total[:, some.start - begin :]
            same, following = (k[:, some.start - back + i : some.stop - back + i] for i in (0, 1))
            echo += ((q[:, some] * same).sum(-1) - weights).exp().sum(-1).cpu()
            induction += ((q[:, some] * following).sum(-1) - weights).exp().sum(-1).cpu()
    count = n - 1 - period
    return echo / count, induction / count


def max_over_query_heads(of_heads: NDArray[np.floating], kv_heads: int) -> NDArray[np.floating]:
    """Scores of KV heads [layers, kv_heads], the maximum over the query heads [layers, query_heads] of each."""
    return of_heads.reshape(len(of_heads), kv_heads, -1).max(-1)


def select_retrieval_heads(
    echo: NDArray[np.floating], induction: NDArray[np.floating], share: float, protect: int = 0
) -> list[LayerHead]:
    """The KV heads that keep everything, best first.

    By the greater of both scores: induction tells what followed, echo finds the place, and a small model has few heads
    for either. The paper takes 14 % by induction and 1 % by echo, which is one head of 90: most needles are lost then.

    Args:
        echo: [layers, kv_heads].
        induction: [layers, kv_heads].
        share: Of all KV heads.
        protect: First layers all of whose heads keep everything, beside that share.

    Returns:
        Distinct pairs. More than the share asks for where that costs nothing, see `even_count`.
    """
    layers, kv_heads = echo.shape
    total = echo.size
    best = [divmod(int(i), kv_heads) for i in np.argsort(-np.maximum(echo, induction), axis=None, kind="stable")]
    protected = [(layer, head) for layer in range(min(protect, layers)) for head in range(kv_heads)]
    chosen = list(dict.fromkeys([*protected, *best[: round(share * total)]])) or best[:1]
    more = [pair for pair in best if pair not in set(chosen)]
    return [*chosen, *more[: round_up_head_count(total, len(chosen)) - len(chosen)]]


def round_up_head_count(total: int, wanted: int, ratio: int = 5) -> int:
    """A number of whole heads, ``wanted`` or somewhat more, with which the cache wastes least.

    An engine's pool hands out blocks for groups of equally many heads: as many as there are whole heads, the last group
    of windowed ones filled up. Memory is compared for long texts, of which windowed heads keep 1 / ratio.
    """

    def memory(whole: int) -> float:
        groups = -(-(total - whole) // whole)
        return whole * (1 + groups / ratio)

    return min(range(wanted, min(total, wanted + wanted // 3) + 1), key=lambda n: (memory(n), n))
