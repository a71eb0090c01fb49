"""Page bounds of a paged KV cache on a GPU, and the selection of candidates by them, with Triton kernels.

The cache has the layout of `paged_triton`, with blocks of 16 or 32 tokens. Each block has its bounds, so that blocks
which requests share, by prefix caching, have one set of them. The bounds of a page are those of its blocks together.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from ..selection import PAGE_SIZE, SelectionRule
from . import paged_triton
from . import programs_page_bounds_triton as kernels
from .launch import MIN_DOT_ROWS
from .paged_triton import MAX_SPLITS, SCORES_LAUNCH, TARGET_PROGRAMS, DeviceBatch

if TYPE_CHECKING:
    from torch import Tensor

TILE = 32  # pages that a program processes at a time


def allocate_bounds(cache: "Tensor") -> "Tensor":
    """Allocate page bounds for a cache.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].

    Returns:
        [num_blocks, num_kv_heads, 2, head_size] in the cache's dtype: minimum, then maximum.

    Raises:
        ValueError: A page is not made of whole blocks.
    """
    blocks, kv_heads, block_size, width = cache.shape
    if PAGE_SIZE % block_size:
        raise ValueError(f"blocks of {block_size} tokens: expected a divisor of {PAGE_SIZE}")
    return torch.empty(blocks, kv_heads, 2, width // 2, dtype=cache.dtype, device=cache.device)


def update_bounds(cache: "Tensor", bounds: "Tensor", slots: "Tensor") -> None:
    """Compute the bounds of the blocks to which keys were written; see `page_bounds.update_bounds`.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], with the new keys.
        bounds: Bounds of the cache, from `allocate_bounds`; overwritten in part.
        slots: [tokens] int64 slots of the new keys, those of a request in ascending order; negative ones are padding.
    """
    head_size = cache.shape[3] // 2
    if not len(slots):
        return
    kernels.update_bounds_kernel[(len(slots), cache.shape[1])](
        cache,
        slots,
        bounds,
        len(slots),
        *cache.stride()[:3],
        KV_HEADS=cache.shape[1],
        HEAD_SIZE=head_size,
        HEAD_SIZE_PADDED=triton.next_power_of_2(head_size),
        BLOCK=cache.shape[2],
    )


def page_scores(
    query: "Tensor", bounds: "Tensor", batch: DeviceBatch, budget: int, scale: float, block_size: int
) -> "Tensor":
    """Compute the weight of each page: a softmax over the bounds of each head, then the maximum over the heads.

    Args:
        query: [num_tokens, num_heads, head_size], heads contiguous.
        bounds: Bounds of the cache, from `allocate_bounds`.
        batch: Requests of the step.
        budget: Number of tokens beyond which a context is scored.
        scale: Softmax scale.
        block_size: Number of tokens in a block.

    Returns:
        [num_requests, 1, num_pages] float32, undefined for requests that are not sparse.
    """
    requests, (heads, head_size), kv_heads = len(batch.seq_lens), query.shape[1:], bounds.shape[1]
    inputs = query, bounds, batch.block_table, batch.query_start_loc, batch.seq_lens
    strides = query.stride(0), batch.block_table.stride(0)
    sizes = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "NUM_QUERIES_PER_KV": heads // kv_heads,
        "ROWS": max(MIN_DOT_ROWS, triton.next_power_of_2(heads // kv_heads)),
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size),
        "BLOCK": block_size,
        "PAGE": PAGE_SIZE,
        "TILE": TILE,
    }
    tiles = triton.cdiv(batch.max_seq_len, TILE * PAGE_SIZE)
    splits = min(MAX_SPLITS, tiles, triton.cdiv(TARGET_PROGRAMS, requests * kv_heads))
    split_lse = torch.empty(requests, heads, splits, dtype=torch.float32, device=query.device)
    kernels.bound_lse_kernel[(requests, kv_heads, splits)](
        *inputs, split_lse, scale, budget, *strides, **sizes, **SCORES_LAUNCH
    )
    result = torch.empty(requests, 1, tiles * TILE, dtype=torch.float32, device=query.device)
    programs = min(tiles, triton.cdiv(TARGET_PROGRAMS, requests))
    kernels.page_weights_kernel[(requests, programs)](
        *inputs,
        split_lse,
        result,
        scale,
        budget,
        result.shape[-1],
        splits,
        *strides,
        **sizes,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        **SCORES_LAUNCH,
    )
    return result


@dataclass(frozen=True)
class Candidates:
    """The tokens of a step to select from.

    Attributes:
        batch: The step as if the contexts of sparse requests had no other tokens.
        pages: [num_requests, num_pages] int32 pages of the candidates in ascending order; undefined where `all_tokens`.
        all_tokens: [num_requests] bool, whether all tokens of the context are candidates.
    """

    batch: DeviceBatch
    pages: "Tensor"
    all_tokens: "Tensor"

    def units_of_context(self, units: "Tensor", rule: SelectionRule) -> "Tensor":
        """Return the pages or tokens of the context from those of the candidates.

        Args:
            units: [num_requests, num_head_groups, num_units] int32, selected with `batch`.
            rule: Selection rule.
        """
        per_page = 1 if rule.granularity == "page" else PAGE_SIZE
        numbers = (units // per_page).long().clamp(0, self.pages.shape[1] - 1)
        pages = self.pages[:, None].expand(-1, units.shape[1], -1).gather(2, numbers)
        return torch.where(self.all_tokens[:, None, None], units, pages * per_page + units % per_page)


def select_candidates(scores: "Tensor", batch: DeviceBatch, rule: SelectionRule, block_size: int) -> Candidates:
    """Select the pages of the highest scores.

    Args:
        scores: [num_requests, 1, num_pages] float32, from `page_scores`.
        batch: Requests of the step.
        rule: Selection rule with a number of candidates.
        block_size: Number of tokens in a block, which divides a page.
    """
    by_page = rule.candidate_rule
    kept = paged_triton.select_tokens(scores, batch, by_page)
    table, lens = paged_triton.shorten_block_table(kept, batch, by_page, block_size)
    longest = min(batch.max_seq_len, rule.candidates)
    compact = DeviceBatch(batch.query_start_loc, lens, table, longest)
    return Candidates(compact, kept[:, 0], batch.seq_lens <= rule.candidates)
