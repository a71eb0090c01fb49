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
ECHO_SHARE = 0.01  # of all KV heads; the rest of the share that is kept goes by induction
ROWS = 256  # query tokens whose attention is held at once

Pair = tuple[int, int]  # layer, KV head


def sequence(vocab_size: int, positions: int, seed: int) -> tuple[list[int], int]:
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


def scores(query: "Tensor", key: "Tensor", scale: float, period: int) -> "tuple[Tensor, Tensor]":
    """How much each query head of a layer attends to earlier copies, in memory for `ROWS` rows of one head.

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
    share = heads // key.shape[1]
    echo, induction = torch.zeros(2, heads)
    column = torch.arange(n, device=query.device)
    for begin in range(1 + period, n, ROWS):
        rows = torch.arange(begin, min(n, begin + ROWS), device=query.device)
        hidden = column[None, : rows[-1] + 1] > rows[:, None]
        for h in range(heads):
            x = query[rows, h].float() @ key[: rows[-1] + 1, h // share].float().T * scale
            weights = x.masked_fill_(hidden, float("-inf")).softmax(-1)
            for back in range(period, n - 1, period):
                at = rows - back  # the same token in an earlier copy; column 0 is the start token
                there = at >= 1
                picked = weights[torch.arange(len(rows), device=rows.device)[there]]
                echo[h] += picked.gather(1, at[there, None]).sum().cpu()
                induction[h] += picked.gather(1, at[there, None] + 1).sum().cpu()
    count = n - 1 - period
    return echo / count, induction / count


def by_group(of_heads: NDArray[np.floating], kv_heads: int) -> NDArray[np.floating]:
    """Scores of KV heads [layers, kv_heads], the maximum over the query heads [layers, query_heads] of each."""
    return of_heads.reshape(len(of_heads), kv_heads, -1).max(-1)


def choose(echo: NDArray[np.floating], induction: NDArray[np.floating], share: float, protect: int = 0) -> list[Pair]:
    """The KV heads that keep everything, best first.

    Args:
        echo: [layers, kv_heads].
        induction: [layers, kv_heads].
        share: Of all KV heads; `ECHO_SHARE` of it goes by echo, the rest by induction.
        protect: First layers all of whose heads keep everything, beside that share.

    Returns:
        Distinct pairs. More than the share asks for where that costs nothing, see `even_count`.
    """
    layers, kv_heads = echo.shape
    total = echo.size
    by_echo, by_induction = (
        [divmod(int(i), kv_heads) for i in np.argsort(-x, axis=None, kind="stable")] for x in (echo, induction)
    )
    protected = [(layer, head) for layer in range(min(protect, layers)) for head in range(kv_heads)]
    some = min(ECHO_SHARE, share)
    wanted = [*by_induction[: round((share - some) * total)], *by_echo[: round(some * total)]]
    chosen = list(dict.fromkeys([*protected, *wanted])) or by_induction[:1]
    more = [pair for pair in by_induction if pair not in set(chosen)]
    return [*chosen, *more[: even_count(total, len(chosen)) - len(chosen)]]


def even_count(total: int, wanted: int, ratio: int = 5) -> int:
    """A number of whole heads, ``wanted`` or somewhat more, with which the cache wastes least.

    An engine's pool hands out blocks for groups of equally many heads: as many as there are whole heads, the last group
    of windowed ones filled up. Memory is compared for long texts, of which windowed heads keep 1 / ratio.
    """

    def memory(whole: int) -> float:
        groups = -(-(total - whole) // whole)
        return whole * (1 + groups / ratio)

    return min(range(wanted, min(total, wanted + wanted // 3) + 1), key=lambda n: (memory(n), n))
