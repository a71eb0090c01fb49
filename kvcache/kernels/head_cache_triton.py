"""A KV cache in which every KV head has blocks of its own, on a GPU: the counterpart of `head_cache`.

Each head is a cache of one KV head in the layout of vLLM's Triton backend, [blocks, 1, block_size, 2 * head_size]: K
and then V of each position. Behind them, a block of a windowed head has room for the float32 means of K and V over all
blocks between it and the sinks. What a token leaves out is computed on the device from its position, so that nothing
waits for it and a step can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from ..head_window import HeadWindow
from . import programs_heads_triton as kernels
from .head_cache import means_bytes

if TYPE_CHECKING:
    from torch import Tensor

TILE = 64  # positions that a program looks at together
MIN_DOT_ROWS = 16  # of a matrix product on tensor cores
PROMPT_ROWS = 64  # of a program that reads a prompt
TARGET_PROGRAMS = 256  # that keep a large GPU busy: fewer tiles are split along their contexts
MAX_SPLITS = 16


@dataclass(frozen=True)
class TritonWindowedStep:
    """The requests of a step, as vLLM's metadata names them.

    Attributes:
        query_start_loc: [requests + 1] int32, where each request's query tokens begin.
        seq_lens: [requests] int32, positions before and at a request's last query token.
        in_prompt: [requests] int32, whether the step processes a prompt.
        max_query_len: An upper bound of a request's query tokens, known to the host.
        max_seq_len: An upper bound of ``seq_lens``, known to the host.
    """

    query_start_loc: "Tensor"
    seq_lens: "Tensor"
    in_prompt: "Tensor"
    max_query_len: int
    max_seq_len: int


class TritonHeadCaches:
    """The KV heads of one layer."""

    def __init__(self, caches: "Sequence[Tensor]", windowed: Sequence[bool], window: HeadWindow) -> None:
        """Look at caches, which stay where they are.

        Args:
            caches: [blocks, 1, block_size, 2 * head_size] of each KV head; of windowed heads, blocks lie far enough
                apart for the means.
            windowed: Which heads leave positions out.
            window: What they leave.

        Raises:
            ValueError: shapes, strides or types that the kernels do not read.
        """
        first = caches[0]
        _, heads, block_size, width = first.shape
        size = width // 2
        room = block_size * width * first.element_size() + means_bytes(size)
        for cache, leaves_out in zip(caches, windowed, strict=True):
            same = cache.dtype == first.dtype and cache.shape[1:] == first.shape[1:]
            if not same or cache.stride() != first.stride() or heads != 1 or cache.stride()[2:] != (width, 1):
                raise ValueError(f"caches {tuple(cache.shape)} {cache.dtype}, strides {cache.stride()}")
            if leaves_out and cache.stride(0) * cache.element_size() < room:
                apart = cache.stride(0) * cache.element_size()
                raise ValueError(f"blocks {apart} bytes apart have no room for means, {room} are needed")
        if block_size & (block_size - 1):
            raise ValueError(f"blocks of {block_size} tokens, a power of two is needed")
        if first.stride(0) * first.element_size() % 4:
            raise ValueError(f"blocks {first.stride(0) * first.element_size()} bytes apart hold no float32")
        self.window, self.block_size, self.size = window, block_size, size
        self.sink_blocks = window.sink_blocks(block_size)
        self._caches, self._windowed = list(caches), list(windowed)
        self._sizes = {"SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size)}
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._where: Tensor | None = None

    def bind(self, tables: "Sequence[Tensor]", slots: "Sequence[Tensor]") -> None:
        """Set the blocks of a step.

        vLLM's tables and slots are buffers that stay, so that the device is told of their addresses a few times only,
        and a captured graph finds them again.

        Args:
            tables: For each head [requests, blocks] int32.
            slots: For each head [tokens] int64, where new keys and values go.
        """
        key = (tables[0].stride(0), *(x.data_ptr() for x in (*tables, *slots)))
        if key not in self._places:
            rows = [
                [cache.data_ptr(), table.data_ptr(), places.data_ptr(), table.stride(0), windowed]
                for cache, table, places, windowed in zip(self._caches, tables, slots, self._windowed, strict=True)
            ]
            self._places[key] = torch.tensor(rows, dtype=torch.int64).to(self._caches[0].device)
        self._where = self._places[key]

    def store_kv(self, key: "Tensor", value: "Tensor") -> None:
        """Write new keys and values, each [tokens, kv_heads, head_size]."""
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
        """Compute the means of blocks that a step begins; call it when the step's keys and values are stored."""
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
        """Attention of the step's tokens.

        Args:
            query: [tokens, query_heads, head_size], heads contiguous.
            scale: Of the scores.
            output: As ``query``.
            step: The requests.
        """
        tokens, heads, size = query.shape
        kv_heads, requests = len(self._caches), len(step.seq_lens)
        share = heads // kv_heads
        rows = max(MIN_DOT_ROWS, triton.next_power_of_2(share))
        if step.max_query_len > 1:
            rows = max(rows, PROMPT_ROWS)
        together = rows // share
        tiles = triton.cdiv(step.max_query_len, together)
        splits = min(
            MAX_SPLITS,
            triton.cdiv(TARGET_PROGRAMS, requests * tiles * kv_heads),
            triton.cdiv(step.max_seq_len, 4 * TILE),
        )
        parts = torch.empty(tokens, heads, splits, size, dtype=torch.float32, device=query.device)
        tops, totals = torch.empty(2, tokens, heads, splits, dtype=torch.float32, device=query.device)
        kernels.windowed_attention_kernel[(requests * tiles, kv_heads, splits)](
            query,
            self._where,
            step.query_start_loc,
            step.seq_lens,
            step.in_prompt,
            parts,
            tops,
            totals,
            scale,
            query.stride(0),
            self._caches[0].stride(0),
            tiles,
            self.sink_blocks,
            self.window.window,
            self.window.ratio,
            HEADS=heads,
            SHARE=share,
            ROWS=rows,
            TOKENS=together,
            **self._sizes,
            BLOCK=self.block_size,
            TILE=TILE,
            EXACT=self.window.exact_prefill,
            COMPENSATION=self.window.compensation,
        )
        kernels.merge_splits_kernel[(tokens, heads)](
            parts, tops, totals, output, splits, output.stride(0), HEADS=heads, **self._sizes
        )
