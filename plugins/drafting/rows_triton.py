"""The tokens and positions of the rows of a step that have logits, read in one kernel."""

from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

jit = cast(Any, triton.jit)
BLOCK = 256  # rows of a program


@jit
def gather_rows_kernel(input_ids, positions, rows, row_ids, row_positions, size, BLOCK: tl.constexpr):
    """Gather one block of rows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i, mask=i < size, other=0)
    tl.store(row_ids + i, tl.load(input_ids + row, mask=i < size, other=0), mask=i < size)
    tl.store(row_positions + i, tl.load(positions + row, mask=i < size, other=0), mask=i < size)


def gather_rows(input_ids: "Tensor", positions: "Tensor", rows: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return ``input_ids[rows]`` and ``positions[rows]``.

    Args:
        input_ids: [tokens] token ids, contiguous.
        positions: [tokens] their positions, contiguous.
        rows: [n] indices of tokens.
    """
    row_ids, row_positions = (
        torch.empty_like(rows, dtype=input_ids.dtype),
        torch.empty_like(rows, dtype=positions.dtype),
    )
    grid = (triton.cdiv(len(rows), BLOCK),)
    gather_rows_kernel[grid](input_ids, positions, rows, row_ids, row_positions, len(rows), BLOCK=BLOCK)
    return row_ids, row_positions
