"""RazorAttention's retrieval heads, found without data (arXiv 2407.15891, section 3.2).

The model reads one block of random tokens four times over. A head that attends to an earlier copy of its token (echo
head), or to the token that followed an earlier copy (induction head), is a retrieval head. All other heads attend
mostly to recent tokens.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

COPIES = 4
BLOCK = 2500  # random tokens in a copy; fewer for a model with a shorter context
ROWS = 256  # query tokens whose attention matrix is in memory at the same time

LayerHead = tuple[int, int]  # layer, KV head


def repeated_random_tokens(vocab_size: int, positions: int, seed: int) -> tuple[list[int], int]:
    """Draw random token ids, and repeat them `COPIES` times.

    Args:
        vocab_size: Size of the model's vocabulary.
        positions: Maximum context length of the model, in tokens.
        seed: Seed of the random generator.

    Returns:
        The token ids, one start token and `COPIES` equal blocks, and the length of a block.
    """
    rng = np.random.default_rng(seed)
    period = min(BLOCK, (positions - 1) // COPIES)
    block = rng.integers(0, vocab_size, period)
    return [int(rng.integers(0, vocab_size)), *np.tile(block, COPIES).tolist()], period


def head_scores(query: "Tensor", key: "Tensor", scale: float, period: int) -> "tuple[Tensor, Tensor]":
    """Compute how much each query head of a layer attends to earlier copies of its tokens.

    At most `ROWS` rows of the attention matrix are in memory at the same time.

    Args:
        query: [n, num_heads, head_size] queries of the tokens of `repeated_random_tokens`, as they enter attention:
            rotated and normalised.
        key: [n, num_kv_heads, head_size], likewise.
        scale: Softmax scale.
        period: Length of a block, in tokens.

    Returns:
        Echo and induction scores, each [num_heads], averaged over the tokens of all copies but the first.
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
    """Return the scores of KV heads [num_layers, num_kv_heads]: the maximum over the query heads of each.

    Args:
        of_heads: [num_layers, num_heads] scores of query heads.
        kv_heads: Number of KV heads.
    """
    return of_heads.reshape(len(of_heads), kv_heads, -1).max(-1)


def select_retrieval_heads(
    echo: NDArray[np.floating], induction: NDArray[np.floating], share: float, protect: int = 0
) -> list[LayerHead]:
    """Select the retrieval heads of a model, best first.

    Heads are ranked by the larger of both scores. The paper takes 14 % of the heads by induction and 1 % by echo. Of
    the 90 heads of a small model, 1 % is a single head, and most needles are lost then.

    Args:
        echo: [num_layers, num_kv_heads] echo scores.
        induction: [num_layers, num_kv_heads] induction scores.
        share: Fraction of all KV heads to select.
        protect: Number of first layers in which every head is a retrieval head, in addition to that fraction.

    Returns:
        Distinct (layer, KV head) pairs; more than ``share`` asks for where that costs no memory, see
        `round_up_head_count`.
    """
    layers, kv_heads = echo.shape
    total = echo.size
    best = [divmod(int(i), kv_heads) for i in np.argsort(-np.maximum(echo, induction), axis=None, kind="stable")]
    protected = [(layer, head) for layer in range(min(protect, layers)) for head in range(kv_heads)]
    selected = list(dict.fromkeys([*protected, *best[: round(share * total)]])) or best[:1]
    more = [pair for pair in best if pair not in set(selected)]
    return [*selected, *more[: round_up_head_count(total, len(selected)) - len(selected)]]


def round_up_head_count(total: int, wanted: int, ratio: int = 5) -> int:
    """Return the number of retrieval heads, at least ``wanted``, that wastes the least KV cache memory.

    vLLM's block pool allocates blocks for groups of equally many heads. A group is as large as the number of retrieval
    heads, and the last group of non-retrieval heads is padded. Memory is compared for long contexts, of which
    non-retrieval heads keep 1 / ratio.

    Args:
        total: Number of KV heads of the model.
        wanted: Smallest number of retrieval heads; at most a third more is returned.
        ratio: Window parameter C of the paper.
    """

    def memory(retrieval_heads: int) -> float:
        groups = -(-(total - retrieval_heads) // retrieval_heads)
        return retrieval_heads * (1 + groups / ratio)

    return min(range(wanted, min(total, wanted + wanted // 3) + 1), key=lambda n: (memory(n), n))
