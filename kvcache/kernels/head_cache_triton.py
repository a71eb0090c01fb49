"""A KV cache in which every KV head has its own blocks, on a GPU: the counterpart of `head_cache`.

The cache of a head has the layout of vLLM's Triton backend for one KV head, [num_blocks, 1, block_size, 2 * head_size]:
K and then V of each position. After them, a block of a non-retrieval head has room for the float32 means of K and V
over all blocks between the sinks and this block. The device computes from a token's position which tokens are evicted
for it. The host does not wait for that, so a step can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from ..head_window import HeadWindow
from . import programs_heads_triton as kernels
from .head_cache import means_bytes
from .launch import MIN_DOT_ROWS, SPLITS_AT_ONCE, KernelConfig, KernelConfigs

if TYPE_CHECKING:
    from torch import Tensor

# DECODE: steps in which every request has one query token. SHORT: in all other steps, requests whose query tokens fit
# one program (decoding, draft tokens, short chunks). PROMPT: longer chunks.
DECODE = KernelConfigs(
    KernelConfig(MIN_DOT_ROWS, 64, num_warps=2, num_stages=3),
    KernelConfig(MIN_DOT_ROWS, 32, num_warps=2, num_stages=2),
)
SHORT = KernelConfigs(KernelConfig(64, 64, num_warps=4, num_stages=3), KernelConfig(64, 32, num_warps=4, num_stages=2))
PROMPT = KernelConfigs(
    KernelConfig(128, 128, num_warps=8, num_stages=3),
    KernelConfig(64, 64, num_warps=4, num_stages=3),
    KernelConfig(64, 32, num_warps=4, num_stages=2),
)
TARGET_SPLITS = 512  # splits of all contexts together that keep a large GPU busy
MAX_SPLITS = 128  # of one context
MIN_SPLIT = 128  # tokens


@dataclass(frozen=True)
class TritonWindowedStep:
    """The requests of a step; the fields have the names of vLLM's attention metadata.

    Attributes:
        query_start_loc: [num_requests + 1] int32, index of the first query token of each request.
        seq_lens: [num_requests] int32, number of tokens up to a request's last query token, itself included.
        prompt_lens: [num_requests] int32, prompt length of each request; 0 where the step processes no token of the
            prompt, the largest int32 if it is unknown: then all query tokens count as prompt.
        max_query_len: Upper bound of the number of query tokens of a request, known to the host.
        max_seq_len: Upper bound of ``seq_lens``, known to the host.
    """

    query_start_loc: "Tensor"
    seq_lens: "Tensor"
    prompt_lens: "Tensor"
    max_query_len: int
    max_seq_len: int


class TritonHeadCaches:
    """The caches of the KV heads of one layer."""

    def __init__(self, caches: "Sequence[Tensor]", windowed: Sequence[bool], window: HeadWindow) -> None:
        """Keep references to the caches of the heads.

        Args:
            caches: For each KV head [num_blocks, 1, block_size, 2 * head_size]; the block stride of a non-retrieval
                head leaves room for the means.
            windowed: For each KV head, whether it is a non-retrieval head.
            window: Window of the non-retrieval heads.

        Raises:
            ValueError: The kernels do not support a shape, stride or dtype.
        """
        first = caches[0]
        _, heads, block_size, width = first.shape
        head_size = width // 2
        room = block_size * width * first.element_size() + means_bytes(head_size)
        for cache, is_windowed in zip(caches, windowed, strict=True):
            same = cache.dtype == first.dtype and cache.shape[1:] == first.shape[1:]
            if not same or cache.stride() != first.stride() or heads != 1 or cache.stride()[2:] != (width, 1):
                raise ValueError(f"unsupported cache {tuple(cache.shape)} {cache.dtype}, strides {cache.stride()}")
            if is_windowed and cache.stride(0) * cache.element_size() < room:
                stride = cache.stride(0) * cache.element_size()
                raise ValueError(f"a block stride of {stride} bytes leaves no room for means, {room} are needed")
        if any(cache.data_ptr() % 16 for cache in caches):
            raise ValueError("a cache does not begin at a multiple of 16 bytes")
        if block_size & (block_size - 1):
            raise ValueError(f"unsupported block size of {block_size} tokens: expected a power of two")
        if first.stride(0) * first.element_size() % 4:
            raise ValueError(
                f"block stride of {first.stride(0) * first.element_size()} bytes: expected a multiple of 4"
            )
        self.window, self.block_size, self.size = window, block_size, head_size
        self.sink_blocks = window.sink_blocks(block_size)
        self._caches, self._windowed = list(caches), list(windowed)
        self._sizes = {"HEAD_SIZE": head_size, "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size)}
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._where: Tensor | None = None

    def bind(self, tables: "Sequence[Tensor]", slots: "Sequence[Tensor]") -> None:
        """Set the block tables and slot mappings of a step.

        vLLM reuses its buffers for them. Their addresses are copied to the device only when they are new, and a
        captured CUDA graph finds them again.

        Args:
            tables: For each KV head, its block table [num_requests, max_blocks] int32.
            slots: For each KV head, its slot mapping [num_tokens] int64 for the new keys and values.
        """
        key = (tables[0].stride(0), *(x.data_ptr() for x in (*tables, *slots)))
        if key not in self._places:
            rows = [
                [cache.data_ptr(), table.data_ptr(), slot_mapping.data_ptr(), table.stride(0), windowed]
                for cache, table, slot_mapping, windowed in zip(
                    self._caches, tables, slots, self._windowed, strict=True
                )
            ]
            self._places[key] = torch.tensor(rows, dtype=torch.int64).to(self._caches[0].device)
        self._where = self._places[key]

    def store_kv(self, key: "Tensor", value: "Tensor") -> None:
        """Write new keys and values, each [num_tokens, num_kv_heads, head_size]."""
        kernels.store_kv_kernel[(len(key), key.shape[1])](
            key,
            value,
            self._where,
            key.stride(0),
            value.stride(0),
            self._caches[0].stride(0),
            **self._sizes,
            BLOCK=self.block_size,
        )

    def update_means(self, step: TritonWindowedStep) -> None:
        """Compute the means of blocks that get their first token in this step; call it after `store_kv`."""
        kernels.update_means_kernel[(len(step.seq_lens), len(self._caches), 2)](
            self._caches[0],
            self._where,
            step.query_start_loc,
            step.seq_lens,
            self._caches[0].stride(0),
            self.sink_blocks,
            **self._sizes,
            BLOCK=self.block_size,
        )

    def attend(self, query: "Tensor", scale: float, output: "Tensor", step: TritonWindowedStep) -> None:
        """Compute the attention of a step's query tokens, and write it to ``output``.

        Args:
            query: [num_tokens, num_heads, head_size], heads contiguous.
            scale: Softmax scale.
            output: [num_tokens, num_heads, head_size], heads contiguous.
            step: Requests of the step.
        """
        heads, kv_heads, requests = query.shape[1], len(self._caches), len(step.seq_lens)
        num_queries_per_kv = heads // kv_heads
        fewest = triton.next_power_of_2(num_queries_per_kv)
        key = query.device, query.dtype, self.size, num_queries_per_kv
        short = DECODE if step.max_query_len == 1 else SHORT
        max_split_query_len = min(max(short.configs[0].rows, fewest) // num_queries_per_kv, step.max_query_len)
        splits = min(MAX_SPLITS, triton.cdiv(TARGET_SPLITS, requests), triton.cdiv(step.max_seq_len, MIN_SPLIT))
        shape = requests * max_split_query_len, heads, splits
        parts = torch.empty(*shape, self.size, dtype=torch.float32, device=query.device)
        tops, totals = torch.empty(2, *shape, dtype=torch.float32, device=query.device)

        def launch_attention(config: KernelConfig, query_len: int, num_splits: int, *, split_kv: bool) -> None:
            rows = max(config.rows, fewest)
            tiles = triton.cdiv(query_len, rows // num_queries_per_kv)
            kernels.windowed_attention_kernel[(requests * tiles, kv_heads, num_splits)](
                query,
                self._where,
                step.query_start_loc,
                step.seq_lens,
                step.prompt_lens,
                output,
                parts,
                tops,
                totals,
                scale,
                query.stride(0),
                output.stride(0),
                self._caches[0].stride(0),
                tiles,
                max_split_query_len,
                self.sink_blocks,
                self.window.window,
                self.window.ratio,
                HEADS=heads,
                NUM_QUERIES_PER_KV=num_queries_per_kv,
                ROWS=rows,
                TOKENS=rows // num_queries_per_kv,
                **self._sizes,
                BLOCK=self.block_size,
                TILE=config.tile,
                EXACT=self.window.exact_prefill,
                COMPENSATION=self.window.compensation,
                SPLIT_KV=split_kv,
                **config.options,
            )

        short.run_first_fitting(key, lambda c: launch_attention(c, max_split_query_len, splits, split_kv=True))
        kernels.merge_splits_kernel[(requests * max_split_query_len, heads)](
            parts,
            tops,
            totals,
            step.query_start_loc,
            output,
            splits,
            max_split_query_len,
            output.stride(0),
            HEADS=heads,
            **self._sizes,
            SPLITS_AT_ONCE=SPLITS_AT_ONCE,
        )
        if step.max_query_len > max_split_query_len:
            PROMPT.run_first_fitting(key, lambda c: launch_attention(c, step.max_query_len, 1, split_kv=False))
