"""A KV cache in which every KV head has its own blocks: `head_cache.cpp` for torch.

The cache of a head has the layout of vLLM's "vec" CPU kernels for one KV head, [num_blocks, 1, block_size,
2 * head_size]: K transposed, [head_size, block_size], and then V, [block_size, head_size]. After both, a block of a
non-retrieval head has room for the float32 means of K and V over all blocks between the sinks and this block. They are
all that the compensation token needs, so there is no state outside the cache that must be reset when a request is
preempted.
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


MAX_DECODE_TOKENS = 2  # requests with up to this many query tokens use the decode kernel


class _Window(Structure):
    _fields_ = (("sinks", c_int32), ("gaps", c_void_p), ("means", c_int64))


@functools.cache
def load_head_cache_library() -> ctypes.CDLL:
    """Load the compiled kernels, and declare their signatures.

    Raises:
        NoCompiler: The kernels are not in the user's cache, and there is no C++ compiler.
    """
    lib = cpp_build.load("head_cache", Path(__file__).parent)
    cache, rows, window, strided = POINTER(CacheView), c_void_p, POINTER(_Window), (c_void_p, c_int64)
    lib.pilotfish_store.argtypes = (c_int, cache, c_void_p, c_int, *strided, *strided, c_int)
    lib.pilotfish_update_means.argtypes = (c_int, cache, c_int, c_void_p, c_void_p, c_int, c_int64, c_int)
    for attend in (lib.pilotfish_attend, lib.pilotfish_read_prompts):
        attend.argtypes = (c_int, cache, rows, window, c_float, *strided, *strided, c_int)
    return lib


def means_bytes(head_size: int) -> int:
    """Return the number of bytes for the means that follow the keys and values of a block."""
    return 2 * head_size * 4


class WindowedStep:
    """The query tokens of a step, and how many tokens are evicted for each of them; all layers share it.

    Requests with few query tokens, which decode or verify drafts, form a `DecodeBatch`, whose contexts are split over
    threads. Requests with more query tokens are `PromptSpans`, processed in tiles that share the keys and values they
    read.
    """

    def __init__(
        self, begins: Sequence[int], ends: Sequence[int], left_out: Callable[[int, int], int], query_heads: int
    ) -> None:
        """Describe a step, whose query tokens are those of the requests in their order.

        Args:
            begins: [num_requests] number of tokens processed before the step.
            ends: [num_requests] number of tokens processed after the step.
            left_out: Function that returns, for a request and a position, how many tokens are evicted in non-retrieval
                heads, in whole blocks.
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
            indices, contexts = [firsts[r] + i for r, i in tokens], [begins[r] + i + 1 for r, i in tokens]
            self.rows = DecodeBatch([r for r, _ in tokens], indices, contexts, query_heads)
        if many:
            self._prompts = torch.tensor(prompts, dtype=torch.int32)
            self.prompts = PromptSpans(len(many), query_heads, *(x.data_ptr() for x in self._prompts), None, None)


class CPUHeadCaches:
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
        import torch

        first = caches[0]
        _, heads, block_size, width = first.shape
        head_size, item = width // 2, first.element_size()
        room = block_size * width * item + means_bytes(head_size)
        for cache, is_windowed in zip(caches, windowed, strict=True):
            if str(cache.dtype) not in DTYPES or cache.dtype != first.dtype or cache.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"unsupported caches {tuple(cache.shape)} {cache.dtype} and {tuple(first.shape)} {first.dtype}"
                )
            if heads != 1 or head_size % 16 or block_size % PAGE_SIZE or cache.stride()[2:] != (width, 1):
                raise ValueError(f"unsupported cache of shape {tuple(cache.shape)}, strides {cache.stride()}")
            if is_windowed and cache.stride(0) * item < room:
                raise ValueError(
                    f"a block stride of {cache.stride(0) * item} bytes leaves no room for means, {room} are needed"
                )
        self.window, self.block_size, self.size = window, block_size, head_size
        self.sink_blocks = window.sink_blocks(block_size)
        self._type = DTYPES[str(first.dtype)]
        self._means = block_size * width  # offset of the means in a block, in elements
        blocks = zip(caches, windowed, strict=True)
        self._heads = (HeadView * len(caches))(*((c.data_ptr(), c.stride(0), None, 0, leaves) for c, leaves in blocks))
        self._cache = CacheView(self._heads, len(caches), block_size, head_size)
        self._slots = (c_void_p * len(caches))()
        self._kept = list(caches)  # keeps the caches alive as long as the pointers to them
        self._threads = torch.get_num_threads

    def bind(self, tables: "Sequence[Tensor]", slots: "Sequence[Tensor]") -> None:
        """Set the block tables and slot mappings of a step.

        Args:
            tables: For each KV head, its block table [num_requests, max_blocks] int32.
            slots: For each KV head, its slot mapping [num_tokens] int64 for the new keys and values.
        """
        for h, (table, slot_mapping) in enumerate(zip(tables, slots, strict=True)):
            self._heads[h].table, self._heads[h].table_stride = table.data_ptr(), table.stride(0)
            self._slots[h] = slot_mapping.data_ptr()

    def store_kv(self, key: "Tensor", value: "Tensor") -> None:
        """Write new keys and values, each [num_tokens, num_kv_heads, head_size]."""
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
        """Compute the means of blocks that get their first token in this step; call it after `store_kv`."""
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
        """Compute the attention of a step's query tokens, and write it to ``output``.

        Args:
            query: [num_tokens, num_heads, head_size], heads contiguous.
            scale: Softmax scale.
            output: [num_tokens, num_heads, head_size], heads contiguous.
            step: Query tokens of the step.
        """
        means = self._means if self.window.compensation else -1
        window = _Window(self.sink_blocks * self.block_size // PAGE_SIZE, step.gaps.data_ptr(), means)
        tensors = (query.data_ptr(), query.stride(0), output.data_ptr(), output.stride(0))
        common = (byref(window), scale, *tensors, self._threads())
        if step.rows is not None:
            load_head_cache_library().pilotfish_attend(self._type, byref(self._cache), byref(step.rows.struct), *common)
        if step.prompts is not None:
            load_head_cache_library().pilotfish_read_prompts(
                self._type, byref(self._cache), byref(step.prompts), *common
            )
