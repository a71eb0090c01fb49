"""Draft trees whose shapes only the device knows: their attention masks, their acceptance, and moves in the cache.

The host knows how many nodes the trees of a step have, and launches kernels by that; see `tree_triton` for trees that
the host knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import programs_device_tree_triton as kernels
from .tree import MAX_DEVICE_NODES

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTS = {1: tl.int8, 2: tl.int16, 4: tl.int32}  # by the size of an element of a cache


@dataclass(frozen=True)
class TreeBatchView:
    """The draft trees of a step, as `tree_triton.tree_attention` takes them; see `tree_triton.TritonTreeBatch`.

    Attributes:
        numbers: [count, 6] int32 numbers of each request; a request without a tree has size 0.
        bits: Attention masks.
        rows: [count * longest] int32 query token of each row; -1 for none.
        count: Number of requests.
        longest: Largest number of rows of a tree.
        positions: Upper bound of the number of tokens before and in a tree.
    """

    numbers: "Tensor"
    bits: "Tensor"
    rows: "Tensor"
    count: int
    longest: int
    positions: int


@dataclass(frozen=True)
class AcceptedPaths:
    """What was accepted of the draft trees of a step. The n rows are those with logits: each root and its nodes.

    Attributes:
        tokens: [requests, max_nodes + 1] int64 sampled tokens along each path.
        counts: [requests] int32 number of these tokens.
        paths: [requests, max_nodes] int32 accepted nodes of each request.
        parents: [n] int32 row of each node's parent among its request's rows; -1 for the root.
        accepted: [n] bool whether each row was accepted.
        rows: [n] int64 the rows of each request, those of its path first.
    """

    tokens: "Tensor"
    counts: "Tensor"
    paths: "Tensor"
    parents: "Tensor"
    accepted: "Tensor"
    rows: "Tensor"


class DeviceTrees:
    """The draft trees of all requests, at addresses that do not change, so that CUDA graphs can read them.

    Args:
        max_num_reqs: Number of requests.
        max_nodes: Largest number of nodes of a tree.
        max_model_len: Largest number of tokens of a text.
        device: The device.

    Attributes:
        parents: [max_num_reqs, max_nodes] int32 parent of each node of a request's tree; -1 for the root. A node
            follows its parent.
        longest: Largest number of rows of a tree of the step, a root and its nodes.

    Raises:
        ValueError: ``max_nodes`` exceeds `MAX_DEVICE_NODES`.
    """

    def __init__(self, max_num_reqs: int, max_nodes: int, max_model_len: int, device: torch.device) -> None:
        if not 1 <= max_nodes <= MAX_DEVICE_NODES:
            raise ValueError(f"expected 1 to {MAX_DEVICE_NODES} nodes of a tree, got {max_nodes}")
        self._max_nodes, self._max_model_len, self.longest = max_nodes, max_model_len, max_nodes + 1
        self._bits_stride = (max_nodes + 1) * (1 + (max_nodes + 1 > 32))
        chain = torch.arange(-1, max_nodes - 1, dtype=torch.int32, device=device)
        self.parents = chain.repeat(max_num_reqs, 1)
        self._numbers = torch.zeros(max_num_reqs, 6, dtype=torch.int32, device=device)
        self._bits = torch.zeros(max_num_reqs, self._bits_stride, dtype=torch.int32, device=device)
        self._rows = torch.full((max_num_reqs * (max_nodes + 1),), -1, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(t.nbytes for t in (self.parents, self._numbers, self._bits, self._rows))

    def describe(
        self,
        idx_mapping: "Tensor",
        cu_num_logits: "Tensor",
        logits_indices: "Tensor",
        positions: "Tensor",
        num_reqs: int,
        num_reqs_padded: int,
        longest: int,
    ) -> None:
        """Compute the attention masks of the trees of a step, and set the positions of nodes by their depth.

        Args:
            idx_mapping: [num_reqs] index of each request in ``parents``.
            cu_num_logits: [num_reqs + 1] int32 first row of each request among those with logits.
            logits_indices: [n] query token of each of these rows.
            positions: [tokens] int64 positions of the query tokens; those of nodes are overwritten.
            num_reqs: Number of requests.
            num_reqs_padded: Number of requests with padding.
            longest: Largest number of rows of a request.
        """
        self.longest = longest
        kernels.describe_trees_kernel[(num_reqs_padded,)](
            idx_mapping,
            cu_num_logits,
            logits_indices,
            positions,
            self.parents,
            self._numbers,
            self._bits,
            self._rows,
            num_reqs,
            longest,
            self._bits_stride,
            MAX_NODES=self._max_nodes,
            ROWS=triton.next_power_of_2(self._max_nodes + 1),
        )

    def clear(self, longest: int) -> None:
        """Describe a step without trees, whose requests have up to ``longest`` rows."""
        self.longest = min(longest, self._max_nodes + 1)
        self._numbers.zero_()
        self._rows.fill_(-1)

    def view(self, num_reqs: int) -> TreeBatchView:
        """Return the trees of the step, for the attention kernel."""
        rows = self._rows[: num_reqs * self.longest]
        return TreeBatchView(self._numbers[:num_reqs], self._bits, rows, num_reqs, self.longest, self._max_model_len)

    def accept(
        self, sampled: "Tensor", drafted: "Tensor", cu_num_logits: "Tensor", idx_mapping: "Tensor"
    ) -> AcceptedPaths:
        """Accept of each tree the path of sampled tokens.

        Args:
            sampled: [n] int64 token sampled at each row, that is after the row's token.
            drafted: [n] token of each row; -1 for an invalid one, which is not accepted.
            cu_num_logits: [requests + 1] int32 first row of each request.
            idx_mapping: [requests] index of each request in ``parents``.
        """
        requests, rows, device = len(idx_mapping), len(sampled), sampled.device
        tokens = torch.zeros(requests, self._max_nodes + 1, dtype=torch.int64, device=device)
        counts = torch.empty(requests, dtype=torch.int32, device=device)
        paths = torch.empty(requests, self._max_nodes, dtype=torch.int32, device=device)
        parents, accepted = (torch.empty(rows, dtype=d, device=device) for d in (torch.int32, torch.bool))
        path_rows = torch.empty(rows, dtype=torch.int64, device=device)
        kernels.accept_trees_kernel[(requests,)](
            sampled,
            drafted,
            cu_num_logits,
            idx_mapping,
            self.parents,
            tokens,
            counts,
            paths,
            parents,
            accepted,
            path_rows,
            MAX_NODES=self._max_nodes,
            NODES_PADDED=triton.next_power_of_2(self._max_nodes),
        )
        return AcceptedPaths(tokens, counts, paths, parents, accepted, path_rows)


def cache_layout(cache: "Tensor") -> tuple[tuple[int, ...], torch.dtype, torch.Size]:
    """Return what the caches of layers that are moved together have in common: strides, dtype, and shape of a block."""
    return cache.stride(), cache.dtype, cache.shape[1:]


class DeviceKVMover:
    """A function that moves the keys and values of accepted nodes to the slots where a chain would have stored them.

    Args:
        caches: For each layer [num_blocks, num_kv_heads, block_size, 2 * head_size], all of one layout; the last
            dimension is contiguous.
    """

    def __init__(self, caches: "Sequence[Tensor]") -> None:
        self._like = caches[0]
        if len({cache_layout(cache) for cache in caches}) > 1:
            raise ValueError("the layers have caches of different layouts")
        self._addresses = torch.tensor([c.data_ptr() for c in caches], dtype=torch.int64, device=self._like.device)

    def __call__(
        self, slots: "Tensor", cu_num_logits: "Tensor", logits_indices: "Tensor", counts: "Tensor", paths: "Tensor"
    ) -> None:
        """Move the accepted nodes of a step.

        Args:
            slots: [tokens] int64 slot of each query token of the step.
            cu_num_logits: [requests + 1] int32 first row of each request.
            logits_indices: [n] query token of each row.
            counts: [requests] int32 number of accepted nodes of each request, plus one.
            paths: [requests, max_nodes] int32 accepted nodes.
        """
        _, heads, block_size, size = self._like.shape
        kernels.move_accepted_kernel[(len(counts), len(self._addresses), heads)](
            self._addresses,
            slots,
            cu_num_logits,
            logits_indices,
            counts,
            paths,
            *self._like.stride()[:3],
            MAX_NODES=paths.shape[1],
            BLOCK=block_size,
            SIZE=size,
            SIZE_PADDED=triton.next_power_of_2(size),
            ELEMENT=ELEMENTS[self._like.element_size()],
        )
