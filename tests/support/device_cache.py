"""A filled KV cache in the layout of vLLM's GPU backends, for tests of Triton kernels."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from pilotfish.kvcache import reference
from pilotfish.kvcache.selection import SelectionRule

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(repr=False)
class DeviceCache:
    """A filled KV cache, and a batch of decode requests (one token) and prefill requests (several tokens)."""

    query: torch.Tensor  # [tokens, heads, head_size]
    keys: list[torch.Tensor]  # per request [context, kv_heads, head_size]
    values: list[torch.Tensor]
    cache: torch.Tensor
    table: torch.Tensor
    starts: list[int]
    contexts: list[int]

    def __repr__(self) -> str:
        shapes = tuple(self.query.shape), tuple(self.cache.shape), self.query.dtype
        return f"DeviceCache(starts={self.starts}, contexts={self.contexts}, query and cache {shapes})"

    def batch(self, kernels: ModuleType) -> Any:
        return kernels.DeviceBatch(
            torch.tensor(self.starts, dtype=torch.int32, device=DEVICE),
            torch.tensor(self.contexts, dtype=torch.int32, device=DEVICE),
            self.table.to(DEVICE),
            max(self.contexts) + 100,
        )

    def sparse(self, rule: SelectionRule) -> list[int]:
        lengths = np.diff(self.starts)
        return [r for r, n in enumerate(self.contexts) if lengths[r] == 1 and n > rule.budget]

    def attention(self, r: int, positions: list[int], scale: float) -> tuple[np.ndarray, np.ndarray]:
        keys, values = (x[r][positions].double().numpy() for x in (self.keys, self.values))
        return reference.attention(self.query[self.starts[r]].cpu().double().numpy(), keys, values, scale)


def build(
    contexts: list[int], queries: list[int], kv_heads: int, share: int, size: int, block: int, dtype: torch.dtype
) -> DeviceCache:
    """Return requests with the given context lengths; their blocks are scattered over a larger cache."""
    rng = torch.Generator().manual_seed(sum(contexts) + size + block)
    need = [-(-c // block) for c in contexts]
    order = torch.randperm(sum(need) + 3, generator=rng)
    # vLLM's layout: the heads of a token are adjacent in memory; the view has the head dimension first.
    cache = torch.full((len(order), block, kv_heads, 2 * size), float("nan"), dtype=dtype).transpose(1, 2)
    table = torch.zeros((len(contexts), -(-(max(contexts) + 100) // block) + 1), dtype=torch.int32)
    keys, values, used = [], [], 0
    for r, context in enumerate(contexts):
        k, v = (torch.randn(context, kv_heads, size, generator=rng).to(dtype) for _ in range(2))
        for b in range(need[r]):
            block_id = int(order[used])
            used += 1
            table[r, b] = block_id
            part = torch.cat([k, v], -1)[b * block : (b + 1) * block]
            cache[block_id, :, : len(part)] = part.transpose(0, 1)
        keys.append(k)
        values.append(v)
    lengths = [min(q, c) for q, c in zip(queries, contexts, strict=True)]
    starts = [0, *np.cumsum(lengths).tolist()]
    query = torch.randn(starts[-1] + 1, kv_heads * share, size, generator=rng).to(dtype)
    return DeviceCache(query.to(DEVICE), keys, values, cache.to(DEVICE), table, starts, contexts)
