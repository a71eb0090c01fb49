"""A filled KV cache in the layout of vLLM's CPU backend, for tests of kernels."""

from dataclasses import dataclass

import torch

from pilotfish.kvcache.kernels.paged_decode import DecodeBatch


@dataclass
class PagedCache:
    """A filled KV cache, with the keys and values that it holds."""

    query: torch.Tensor  # [tokens, heads, head_size]
    keys: list[torch.Tensor]  # per request [context, kv_heads, head_size]
    values: list[torch.Tensor]
    cache: torch.Tensor
    table: torch.Tensor
    rows: DecodeBatch
    tokens: list[int]
    contexts: list[int]


def build(
    contexts: list[int], kv_heads: int, share: int, size: int, block: int, dtype: torch.dtype, seed: int
) -> PagedCache:
    """Return requests with the given context lengths; their blocks are scattered over a larger cache."""
    rng = torch.Generator().manual_seed(seed)
    need = [-(-c // block) for c in contexts]
    order = torch.randperm(sum(need) + 3, generator=rng)
    cache = torch.full((len(order), kv_heads, block, 2 * size), float("nan"), dtype=dtype)
    table = torch.full((len(contexts), max(need) + 1), -1, dtype=torch.int32)
    keys, values, used = [], [], 0
    for r, context in enumerate(contexts):
        k, v = (torch.randn(context, kv_heads, size, generator=rng).to(dtype) for _ in range(2))
        for b in range(need[r]):
            block_id = int(order[used])
            used += 1
            table[r, b] = block_id
            part = cache[block_id].view(kv_heads, 2, block * size)
            kt, vt = part[:, 0].view(kv_heads, size, block), part[:, 1].view(kv_heads, block, size)
            n = min(block, context - b * block)
            kt[:, :, :n] = k[b * block : b * block + n].permute(1, 2, 0)
            vt[:, :n] = v[b * block : b * block + n].permute(1, 0, 2)
        keys.append(k)
        values.append(v)
    tokens = torch.randperm(len(contexts) + 2, generator=rng)[: len(contexts)].tolist()
    query = torch.randn(len(contexts) + 2, kv_heads * share, size, generator=rng).to(dtype)
    rows = DecodeBatch(list(range(len(contexts))), tokens, contexts, kv_heads * share)
    return PagedCache(query, keys, values, cache, table, rows, tokens, contexts)
