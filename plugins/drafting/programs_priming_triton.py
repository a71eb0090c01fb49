"""Triton kernels of `adjacency_triton` that fill the tables from a text."""

from typing import Any, cast

import triton
import triton.language as tl

from .programs_adjacency_triton import NONE, context_keys, context_rows

jit = cast(Any, triton.jit)

OUTSIDE: tl.constexpr = tl.constexpr(1 << 62)  # row of a context that is longer than the text


@jit
def text_rows_kernel(
    text,
    size,
    table,
    rows,
    row_keys,
    vocab,
    num_hashed,
    ORDER: tl.constexpr,
    ORDER_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the rows of all contexts of a text that have a follower, and the contexts' keys, [size - 1, ORDER]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size - 1
    d = tl.arange(0, ORDER_PADDED)
    known = (d[None, :] < ORDER) & (d[None, :] <= i[:, None]) & inside[:, None]
    context = tl.load(text + i[:, None] - d[None, :], mask=known, other=0)
    for length in tl.static_range(ORDER):
        key = context_keys(context, length + 1)
        own, _ = context_rows(key, context, table.to(tl.int64), vocab, num_hashed, length + 1)
        at = i.to(tl.int64) * ORDER + length
        tl.store(rows + at, tl.where(i >= length, own, OUTSIDE), mask=inside)
        tl.store(row_keys + at, key, mask=inside)


@jit
def prime_rows_kernel(
    text,
    size,  # number of entries
    sorted_rows,
    entries,
    row_keys,
    tokens,
    confidences,
    keys,
    vocab,
    num_hashed,
    FROM_TEXT: tl.constexpr,
    MOST: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Insert the followers of one row's contexts at the front of the row, the latest first; see `prime_from_text`.

    The entries (position and length of a context) are sorted by row and then by position. The program of a row's last
    entry does the work, the others none. Only the last ``MOST`` entries of a row are read.
    """
    last = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + last)
    after = tl.load(sorted_rows + last + 1, mask=last + 1 < size, other=NONE)
    if (row != OUTSIDE) & (row != after):
        rank = tl.arange(0, K_PADDED)
        in_table = row % (vocab + num_hashed)
        hashed = in_table >= vocab
        key_at = keys + row // (vocab + num_hashed) * num_hashed + in_table - vocab
        key = tl.load(row_keys + tl.load(entries + last))
        kept = tl.full([K_PADDED], NONE, tl.int32)
        confidence = tl.full([K_PADDED], FROM_TEXT, tl.int32)
        count, at = 0, last
        first = tl.maximum(last - MOST + 1, 0)
        same = True
        while same & (at >= first) & (count < K):
            entry = tl.load(entries + at)
            follower = tl.load(text + entry // ORDER + 1)
            # An earlier context of the same row: its candidates were dropped when this one claimed the row.
            same = (tl.load(sorted_rows + at) == row) & (tl.load(row_keys + entry) == key)
            new = same & (tl.sum((kept == follower).to(tl.int32), axis=0) == 0)
            kept = tl.where(new & (rank == count), follower, kept)
            count += new.to(tl.int32)
            at -= 1
        # Where the walk ended before another context's entry, older candidates of the row follow.
        ended_in_row = (~same) & (tl.load(sorted_rows + at + 1) == row)
        owned = (~hashed) | (tl.load(key_at, mask=hashed, other=0) == key)
        if owned & (~ended_in_row):
            for i in range(K):
                old = tl.load(tokens + row * K + i)
                how = tl.load(confidences + row * K + i).to(tl.int32)
                new = (old != NONE) & (count < K) & (tl.sum((kept == old).to(tl.int32), axis=0) == 0)
                kept = tl.where(new & (rank == count), old, kept)
                confidence = tl.where(new & (rank == count), how, confidence)
                count += new.to(tl.int32)
        tl.store(tokens + row * K + rank, kept, mask=rank < K)
        tl.store(confidences + row * K + rank, confidence.to(tl.uint8), mask=rank < K)
        tl.store(key_at, key, mask=hashed)
