"""The most probable tokens of each row of logits on a device, in two kernels that read the logits once."""

from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

jit = cast(Any, triton.jit)
BLOCK = 4096  # logits of a program


@jit
def block_top_k_kernel(
    logits, row_stride, width, values, ids, blocks, K: tl.constexpr, K_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Find the k largest logits of one block of a row."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, rank = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K_PADDED)
    left = tl.load(logits + row * row_stride + at, mask=at < width, other=-float("inf")).to(tl.float32)
    largest = tl.full([K_PADDED], -float("inf"), tl.float32)
    where = tl.zeros([K_PADDED], tl.int32)
    for i in tl.static_range(K):
        top = tl.argmax(left, axis=0)
        largest = tl.where(rank == i, tl.max(left, axis=0), largest)
        where = tl.where(rank == i, block * BLOCK + top, where)
        left = tl.where(at == block * BLOCK + top, -float("inf"), left)
    to = (row * blocks + block) * K + rank
    tl.store(values + to, largest, mask=rank < K)
    tl.store(ids + to, where, mask=rank < K)


@jit
def merge_top_k_kernel(
    values, ids, top_ids, probs, count, K: tl.constexpr, K_PADDED: tl.constexpr, COUNT_PADDED: tl.constexpr
):
    """Merge the blocks of one row, and normalise the probabilities over its k largest logits."""
    row = tl.program_id(0).to(tl.int64)
    at, rank = tl.arange(0, COUNT_PADDED), tl.arange(0, K_PADDED)
    left = tl.load(values + row * count + at, mask=at < count, other=-float("inf"))
    named = tl.load(ids + row * count + at, mask=at < count, other=0)
    largest = tl.full([K_PADDED], -float("inf"), tl.float32)
    token = tl.zeros([K_PADDED], tl.int32)
    for i in tl.static_range(K):
        top = tl.argmax(left, axis=0)
        largest = tl.where(rank == i, tl.max(left, axis=0), largest)
        token = tl.where(rank == i, tl.sum(tl.where(at == top, named, 0), axis=0), token)
        left = tl.where(at == top, -float("inf"), left)
    weight = tl.exp(largest - tl.max(largest, axis=0))
    tl.store(top_ids + row * K + rank, token.to(tl.int64), mask=rank < K)
    tl.store(probs + row * K + rank, weight / tl.sum(weight, axis=0), mask=rank < K)


def top_k_probs(logits: "Tensor", k: int) -> tuple["Tensor", "Tensor"]:
    """Return the k most probable tokens of each row, and their probabilities, normalised over the k tokens.

    Args:
        logits: [n, vocabulary], contiguous in the last dimension.
        k: Number of tokens.

    Returns:
        Token ids [n, k] int64, best first, and probabilities [n, k] float32.
    """
    n, width = logits.shape
    blocks = triton.cdiv(width, BLOCK)
    values = torch.empty(n, blocks, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(n, blocks, k, dtype=torch.int32, device=logits.device)
    top_ids = torch.empty(n, k, dtype=torch.int64, device=logits.device)
    probs = torch.empty(n, k, dtype=torch.float32, device=logits.device)
    shape = {"K": k, "K_PADDED": triton.next_power_of_2(k)}
    block_top_k_kernel[(n, blocks)](logits, logits.stride(0), width, values, ids, blocks, **shape, BLOCK=BLOCK)
    merge_top_k_kernel[(n,)](
        values, ids, top_ids, probs, blocks * k, **shape, COUNT_PADDED=triton.next_power_of_2(blocks * k)
    )
    return top_ids, probs
