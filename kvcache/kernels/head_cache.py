"""A KV cache in which every KV head has blocks of its own: `head_cache.cpp` for torch.

Each head is a cache of one KV head in the layout of vLLM's "vec" CPU kernels, [blocks, 1, block_size, 2 * head_size]: K
transposed [head_size, block_size] and then V [block_size, head_size]. Behind both, a block of a windowed head has room
for the float32 means of K and V over all blocks between it and the sinks, which is all that the compensation needs: no
state beside the cache, nothing to set back when a request is preempted.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish._internal import cpp_build

from ..head_window import HeadWindow
from ..selection import PAGE_SIZE
from .paged_decode import DTYPES, CacheView, DecodeBatch, HeadView, PromptSpans

if TYPE_CHECKING:
    from torch import Tensor


MAX_DECODE_TOKENS = 2  # query tokens of a request that are read one by one


class _Window(Structure):
    _fields_ = (("sinks", c_int32), ("gaps", c_void_p), ("means", c_int64))


@functools.cache
def load_head_cache_library() -> ctypes.CDLL:
    """The compiled kernels, with their signatures.

    Raises:
        NoCompiler: they are not in the cache, and nothing can compile them.
    """
    lib = cpp_build.load("head_cache", Path(__file__).parent)
    cache, rows, window, where = POINTER(CacheView), c_void_p, POINTER(_Window), (c_void_p, c_int64)
    lib.pilotfish_store.argtypes = (c_int, cache, c_void_p, c_int, *where, *where, c_int)
    lib.pilotfish_update_means.argtypes = (c_int, cache, c_int, c_void_p, c_void_p, c_int, c_int64, c_int)
    for attend in (lib.pilotfish_attend, lib.pilotfish_read_prompts):
        attend.argtypes = (c_int, cache, rows, window, c_float, *where, *where, c_int)
    return lib


def means_bytes(head_size: int) -> int:
    """Room for the means behind the keys and values of a block."""
    return 2 * head_size * 4


class WindowedStep:
    """What the layers of a step share: which positions are new, and what each of them leaves out.

    Tokens of a request that come one or a few at a time, as decoded ones and drafts do, are `Rows`, whose contexts are
    split over threads; more of them share what they read, tile by tile.
    """

    def __init__(
        self, begins: Sequence[int], ends: Sequence[int], left_out: Callable[[int, int], int], query_heads: int
    ) -> None:
        """Describe a step, whose query tokens are those of the requests in their order.

        Args:
            begins: [requests] positions of each processed before the step.
            ends: [requests] and after it.
            left_out: For a request and a position of it, how many positions windowed heads leave out: whole blocks.
            query_heads: Number of query heads.
        """
        import torch

        spans = list(zip(begins, ends, strict=True))
        firsts = [0, *accumulate(e - b for b, e in spans)]
        few = [r for r, (b, e) in enumerate(spans) if e - b <= MAX_DECODE_TOKENS]
        tokens = [(r, i) for r in few for i in range(ends[r] - begins[r])]
        many = [r for r, (b, e) in enumerate(spans) if e - b > MAX_DECODE_TOKENS]
        prompts = [many, [firsts[r] for r in many], [begins[r] + 1 for r in many], [ends[r] - begins[r] for r in many]]
        self.begins, self.ends = (torch.tensor(x, dtype=torch.int32) for x in (begins, ends))
        self.gaps = torch.tensor([left_out(r, n) for r, (b, e) in enumerate(spans) for n in range(b, e)])
        self.gaps = (self.gaps // PAGE_SIZE).int()
        self.rows = self.prompts = None
        if tokens:
            places, contexts = [firsts[r] + i for r, i in tokens], [begins[r] + i + 1 for r, i in tokens]
            self.rows = DecodeBatch([r for r, _ in tokens], places, contexts, query_heads)
        if many:
            self._prompts = torch.tensor(prompts, dtype=torch.int32)
            self.prompts = PromptSpans(len(many), query_heads, *(x.data_ptr() for x in self._prompts), None, None)


class CPUHeadCaches:
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
        import torch

        first = caches[0]
        _, heads, block_size, width = first.shape
        size, item = width // 2, first.element_size()
        room = block_size * width * item + means_bytes(size)
        for cache, leaves_out in zip(caches, windowed, strict=True):
            if str(cache.dtype) not in DTYPES or cache.dtype != first.dtype or cache.shape[1:] != first.shape[1:]:
                raise ValueError(f"caches {tuple(cache.shape)} {cache.dtype} and {tuple(first.shape)} {first.dtype}")
            if heads != 1 or size % 16 or block_size % PAGE_SIZE or cache.stride()[2:] != (width, 1):
                raise ValueError(f"a cache of shape {tuple(cache.shape)}, strides {cache.stride()}")
            if leaves_out and cache.stride(0) * item < room:
                raise ValueError(
                    f"blocks {cache.stride(0) * item} bytes apart have no room for means, {room} are needed"
                )
        self.window, self.block_size, self.size = window, block_size, size
        self.sink_blocks = window.sink_blocks(block_size)
        self._type = DTYPES[str(first.dtype)]
        self._means = block_size * width  # where they begin, in elements
        blocks = zip(caches, windowed, strict=True)
        self._heads = (HeadView * len(caches))(*((c.data_ptr(), c.stride(0), None, 0, leaves) for c, leaves in blocks))
        self._cache = CacheView(self._heads, len(caches), block_size, size)
        self._slots = (c_void_p * len(caches))()
        self._kept = list(caches)  # alive, while pointers to them are
        self._threads = torch.get_num_threads

    def bind(self, tables: "Sequence[Tensor]", slots: "Sequence[Tensor]") -> None:
        """Set the blocks of a step.

        Args:
            tables: For each head [requests, blocks] int32.
            slots: For each head [tokens] int64, where new keys and values go.
        """
        for h, (table, places) in enumerate(zip(tables, slots, strict=True)):
            self._heads[h].table, self._heads[h].table_stride = table.data_ptr(), table.stride(0)
            self._slots[h] = places.data_ptr()

    def store_kv(self, key: "Tensor", value: "Tensor") -> None:
        """Write new keys and values, each [tokens, kv_heads, head_size]."""
        load_head_cache_library().pilotfish_store(
            self._type,
            byref(self._cache),
            self._slots,
            len(key),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            self._threads(),
        )

    def update_means(self, step: WindowedStep) -> None:
        """Compute the means of blocks that a step begins; call it when the step's keys and values are stored."""
        load_head_cache_library().pilotfish_update_means(
            self._type,
            byref(self._cache),
            len(step.begins),
            step.begins.data_ptr(),
            step.ends.data_ptr(),
            self.sink_blocks,
            self._means,
            self._threads(),
        )

    def attend(self, query: "Tensor", scale: float, output: "Tensor", step: WindowedStep) -> None:
        """Attention of the step's tokens.

        Args:
            query: [tokens, query_heads, head_size], heads contiguous.
            scale: Of the scores.
            output: As ``query``.
            step: Says what each token sees.
        """
        means = self._means if self.window.compensation else -1
        window = _Window(self.sink_blocks * self.block_size // PAGE_SIZE, step.gaps.data_ptr(), means)
        where = (query.data_ptr(), query.stride(0), output.data_ptr(), output.stride(0))
        common = (byref(window), scale, *where, self._threads())
        if step.rows is not None:
            load_head_cache_library().pilotfish_attend(self._type, byref(self._cache), byref(step.rows.struct), *common)
        if step.prompts is not None:
            load_head_cache_library().pilotfish_read_prompts(
                self._type, byref(self._cache), byref(step.prompts), *common
            )
