"""A KV cache in which every KV head has blocks of its own: `head_cache.cpp` for torch.

Each head is a cache of one KV head in the layout of vLLM's "vec" CPU kernels, [blocks, 1, block_size, 2 * head_size]: K
transposed [head_size, block_size] and then V [block_size, head_size]. Behind both, a block of a windowed head has room
for the float32 means of K and V over all blocks between it and the sinks, which is all that the compensation needs: no
state beside the cache, nothing to set back when a request is preempted.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

from ..head_window import HeadWindow
from ..selection import GROUP
from . import native
from .paged_decode import TYPES, Cache, Head, Rows

if TYPE_CHECKING:
    from torch import Tensor


class _Window(Structure):
    _fields_ = (("sinks", c_int32), ("gaps", c_void_p), ("means", c_int64))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, with their signatures.

    Raises:
        NoCompiler: they are not in the cache, and nothing can compile them.
    """
    lib = native.load("head_cache")
    cache, rows, where = POINTER(Cache), c_void_p, (c_void_p, c_int64)
    lib.pilotfish_store.argtypes = (c_int, cache, c_void_p, c_int, *where, *where, c_int)
    lib.pilotfish_update_means.argtypes = (c_int, cache, c_int, c_void_p, c_void_p, c_int, c_int64, c_int)
    lib.pilotfish_attend.argtypes = (c_int, cache, rows, POINTER(_Window), c_float, *where, *where, c_int)
    return lib


def means_bytes(head_size: int) -> int:
    """Room for the means behind the keys and values of a block."""
    return 2 * head_size * 4


class WindowedStep:
    """What the layers of a step share: which positions are new, which tokens are decoded here, what is left out.

    Attributes:
        begins: [requests] int32 positions of each processed before the step.
        ends: [requests] int32, and after it.
        rows: The query tokens that `HeadCaches.attend` serves; None when there are none.
        gaps: [rows] int32 groups that windowed heads leave out.
    """

    def __init__(self, begins: Sequence[int], ends: Sequence[int], rows: Rows | None, left_out: Sequence[int]) -> None:
        """Describe a step; ``left_out`` [rows] positions that windowed heads leave out, whole blocks."""
        import torch

        self.begins = torch.tensor(begins, dtype=torch.int32)
        self.ends = torch.tensor(ends, dtype=torch.int32)
        self.rows = rows
        self.gaps = torch.tensor(left_out, dtype=torch.int32) // GROUP


class HeadCaches:
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
            if str(cache.dtype) not in TYPES or cache.dtype != first.dtype or cache.shape[1:] != first.shape[1:]:
                raise ValueError(f"caches {tuple(cache.shape)} {cache.dtype} and {tuple(first.shape)} {first.dtype}")
            if heads != 1 or size % 16 or block_size % GROUP or cache.stride()[2:] != (width, 1):
                raise ValueError(f"a cache of shape {tuple(cache.shape)}, strides {cache.stride()}")
            if leaves_out and cache.stride(0) * item < room:
                raise ValueError(
                    f"blocks {cache.stride(0) * item} bytes apart have no room for means, {room} are needed"
                )
        self.window, self.block_size, self.size = window, block_size, size
        self.sink_blocks = window.sink_blocks(block_size)
        self._type = TYPES[str(first.dtype)]
        self._means = block_size * width  # where they begin, in elements
        blocks = zip(caches, windowed, strict=True)
        self._heads = (Head * len(caches))(*((c.data_ptr(), c.stride(0), None, 0, leaves) for c, leaves in blocks))
        self._cache = Cache(self._heads, len(caches), block_size, size)
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

    def store(self, key: "Tensor", value: "Tensor") -> None:
        """Write new keys and values, each [tokens, kv_heads, head_size]."""
        library().pilotfish_store(
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
        library().pilotfish_update_means(
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
        """Attention of the step's rows; writes their part of ``output``.

        Args:
            query: [tokens, query_heads, head_size], heads contiguous.
            scale: Of the scores.
            output: As ``query``.
            step: Holds the rows.
        """
        assert step.rows is not None
        means = self._means if self.window.compensation else -1
        window = _Window(self.sink_blocks * self.block_size // GROUP, step.gaps.data_ptr(), means)
        library().pilotfish_attend(
            self._type,
            byref(self._cache),
            byref(step.rows.struct),
            byref(window),
            scale,
            query.data_ptr(),
            query.stride(0),
            output.data_ptr(),
            output.stride(0),
            self._threads(),
        )
