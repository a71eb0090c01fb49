"""The adjacency tables of Token Recycling on a device; the counterpart of `adjacency`.

Only `to_host` and `from_host` synchronise with the device: kernels are launched with sizes that the host knows.
Several tables, one for each group of requests that shares one, follow one another in the same tensors.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton

from ..contracts import DeviceBatch
from . import programs_adjacency_triton as kernels
from . import programs_drafts_triton as drafts_kernels
from . import programs_priming_triton as priming_kernels
from .adjacency_table import (
    BIN_EDGES,
    FROM_TEXT,
    MAX_SEEN,
    NONE,
    NUM_CONFIDENCES,
    AcceptanceRates,
    AdjacencyTable,
    make_acceptance_rates,
    make_adjacency_table,
)

if TYPE_CHECKING:
    from torch import Tensor

BEAMS = 4  # beams of the search for a chain
TREE_BEAMS = 8  # and for a tree
MAX_DEPTH = 12  # of a tree of the table's candidates
MAX_CHAIN_DEPTH = 24  # of a tree that contains a chain of another source
TILE = 64  # candidates of a tree that a program sorts
MOST_FOLLOWERS = 4096  # occurrences of a context in a prompt that priming reads, the latest ones
BLOCK = 256  # elements of a program


class DeviceAdjacencyTables:
    """Adjacency tables and acceptance rates on a device.

    Args:
        vocab_size: Size of the vocabulary.
        k: Number of candidates in a row.
        order: Longest context with its own rows, in tokens.
        bits: Logarithm of the number of hashed rows of a table.
        num_tables: Number of tables.
        max_num_reqs: Largest number of requests; each `req_idx` is below it.
        device: The device.

    Attributes:
        table_of_request: [max_num_reqs] int32 table of each request.
    """

    def __init__(
        self, vocab_size: int, k: int, order: int, bits: int, num_tables: int, max_num_reqs: int, device: torch.device
    ) -> None:
        self._vocab, self._k, self._order = vocab_size, k, order
        self._empty = make_adjacency_table(0, k, order, bits), make_acceptance_rates(order, k)
        self._hashed = len(self._empty[0].keys)
        self._rows = vocab_size + self._hashed
        shape = num_tables, self._rows, k
        self._tokens = torch.full(shape, NONE, dtype=torch.int32, device=device)
        self._confidence = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._keys = torch.zeros(num_tables, self._hashed, dtype=torch.int64, device=device)  # the bits of uint64
        self._owners = torch.full((num_tables, self._rows), NONE, dtype=torch.int32, device=device)
        prior = (torch.from_numpy(a).to(device) for a in self._empty[1])
        self._seen, self._right, self._rate = (a.repeat(num_tables, 1, 1, 1) for a in prior)
        self._prior = self._seen[0].clone(), self._right[0].clone(), self._rate[0].clone()
        self._edges = torch.from_numpy(BIN_EDGES).to(device)
        self.table_of_request = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._shape = {
            "K": k,
            "K_PADDED": triton.next_power_of_2(k),
            "ORDER": order,
            "ORDER_PADDED": triton.next_power_of_2(order),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        tensors = self._tokens, self._confidence, self._keys, self._owners, self._seen, self._right, self._rate
        return sum(t.nbytes for t in tensors)

    @property
    def arguments(self) -> tuple["Tensor | int", ...]:
        """The tables, as kernels that read candidates take them."""
        tensors = self.table_of_request, self._tokens, self._confidence, self._keys, self._rate
        return *tensors, self._vocab, self._hashed

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time constants of these kernels."""
        return {**self._shape, "CONFIDENCES": NUM_CONFIDENCES}

    def clear(self, table: int) -> None:
        """Empty a table."""
        self._tokens[table].fill_(NONE)
        self._keys[table].zero_()
        for counts, prior in zip((self._seen, self._right, self._rate), self._prior, strict=True):
            counts[table].copy_(prior)

    def update(self, batch: DeviceBatch) -> None:
        """Update the acceptance rates from the sampled tokens, and then the rows of all verified positions.

        Where positions share a row, the one that `adjacency.update_rows` would write last wins.
        """
        where = (
            batch.all_token_ids,
            batch.all_token_ids.stride(0),
            batch.idx_mapping,
            batch.num_sampled,
            self.table_of_request,
            batch.cu_num_logits,
            batch.input_ids,
            batch.positions,
            batch.parents,
            batch.accepted,
            self._owners,
            self._tokens,
            self._confidence,
            self._keys,
        )
        kernels.count_and_claim_kernel[(batch.num_requests, batch.max_num_logits)](
            *where,
            batch.total_len,
            self._seen,
            self._right,
            self._vocab,
            self._hashed,
            MAX_NUM_LOGITS=batch.max_num_logits,
            TREES=batch.parents is not None,
            **self.constants,
        )
        num_rates = self._rate.numel()
        grid = (batch.num_requests * batch.max_num_logits + triton.cdiv(num_rates, BLOCK),)
        kernels.write_and_refresh_kernel[grid](
            *where,
            batch.candidate_ids,
            batch.candidate_probs,
            self._edges,
            self._seen,
            self._right,
            self._rate,
            batch.num_requests,
            num_rates,
            self._vocab,
            self._hashed,
            EDGES=len(BIN_EDGES),
            EDGES_PADDED=triton.next_power_of_2(len(BIN_EDGES)),
            MAX_NUM_LOGITS=batch.max_num_logits,
            **self._shape,
            TREES=batch.parents is not None,
            LIMIT=MAX_SEEN,
            BLOCK=BLOCK,
        )

    def prime_from_text(self, table: int, text: "Tensor") -> None:
        """Insert the token after each context of a text [t] int32 at the first rank of the context's rows."""
        size = len(text)
        if size < 2:
            return
        total = (size - 1) * self._order
        rows = torch.empty(total, dtype=torch.int64, device=text.device)
        row_keys = torch.empty_like(rows)
        priming_kernels.text_rows_kernel[(triton.cdiv(size - 1, BLOCK),)](
            text,
            size,
            table,
            rows,
            row_keys,
            self._vocab,
            self._hashed,
            ORDER=self._order,
            ORDER_PADDED=self._shape["ORDER_PADDED"],
            BLOCK=BLOCK,
        )
        by_row, entries = rows.sort(stable=True)
        priming_kernels.prime_rows_kernel[(total,)](
            text,
            total,
            by_row,
            entries,
            row_keys,
            self._tokens,
            self._confidence,
            self._keys,
            self._vocab,
            self._hashed,
            FROM_TEXT=FROM_TEXT,
            MOST=MOST_FOLLOWERS,
            K=self._k,
            K_PADDED=self._shape["K_PADDED"],
            ORDER=self._order,
        )

    def propose_chains(self, batch: DeviceBatch, drafts: "Tensor", scores: "Tensor") -> None:
        """Propose a chain for each request of the batch, and the probabilities that its tokens are accepted.

        Args:
            batch: The step.
            drafts: [requests, steps] int64, contiguous; output.
            scores: [requests, steps] float32, contiguous; output.
        """
        steps = drafts.shape[1]
        drafts_kernels.propose_chain_kernel[(batch.num_requests,)](
            *batch.texts,
            *self.arguments,
            drafts,
            scores,
            NUM_SPEC_TOKENS=steps,
            NUM_SPEC_TOKENS_PADDED=triton.next_power_of_2(steps),
            BEAMS=BEAMS,
            **self.constants,
        )

    def propose_trees(
        self,
        batch: DeviceBatch,
        drafts: "Tensor",
        parents: "Tensor",
        scores: "Tensor",
        chain: "tuple[Tensor, Tensor] | None" = None,
    ) -> None:
        """Propose a tree for each request of the batch: the nodes of the highest scores, the best first.

        Args:
            batch: The step; its ``chain_only`` is read.
            drafts: [requests, steps] int64, contiguous; output.
            parents: [requests, steps] int32, contiguous; output.
            scores: [requests, steps] float32, contiguous; output. The probability that a node is accepted.
            chain: Tokens [requests, at least min(steps, MAX_CHAIN_DEPTH)] int64 of a chain that another source
                proposes, and their scores, which do not increase, and are 0 after its end. The chain is in the tree, as
                far as its scores suffice.
        """
        steps = drafts.shape[1]
        depth, k = min(MAX_DEPTH if chain is None else MAX_CHAIN_DEPTH, steps), self._shape["K_PADDED"]
        shape = batch.num_requests, depth * TREE_BEAMS * k
        pool_tokens, pool_parents = torch.empty(2, *shape, dtype=torch.int32, device=drafts.device).unbind()
        pool_scores = torch.empty(shape, dtype=torch.float32, device=drafts.device)
        chain_tokens, chain_scores = (drafts, scores) if chain is None else chain
        drafts_kernels.expand_beams_kernel[(batch.num_requests,)](
            *batch.texts,
            *self.arguments,
            batch.chain_only,
            chain_tokens,
            chain_scores,
            pool_tokens,
            pool_scores,
            pool_parents,
            DEPTH=depth,
            BEAMS=TREE_BEAMS,
            HAS_CHAIN=chain is not None,
            CHAIN_LENGTH=chain_tokens.shape[1],
            **self.constants,
        )
        drafts_kernels.select_nodes_kernel[(batch.num_requests, triton.cdiv(shape[1], TILE))](
            *batch.texts,
            pool_tokens,
            pool_scores,
            pool_parents,
            drafts,
            parents,
            scores,
            shape[1],
            NUM_SPEC_TOKENS=steps,
            ROWS=TILE,
            COLUMNS=TILE,
        )

    def to_host(self, table: int) -> tuple[AdjacencyTable, AcceptanceRates]:
        """Return copies of a table and its acceptance rates in host memory; waits for the device."""
        rows = AdjacencyTable(
            self._tokens[table].cpu().numpy(),
            self._confidence[table].cpu().numpy(),
            self._keys[table].cpu().numpy().view(np.uint64),
        )
        counts = (a[table].cpu().numpy() for a in (self._seen, self._right, self._rate))
        return rows, AcceptanceRates(*counts)

    def from_host(self, table: int, rows: AdjacencyTable, acceptance: AcceptanceRates) -> None:
        """Replace the contents of a table."""
        self._tokens[table].copy_(torch.from_numpy(rows.tokens))
        self._confidence[table].copy_(torch.from_numpy(rows.confidence))
        self._keys[table].copy_(torch.from_numpy(rows.keys.view(np.int64)))
        for counts, array in zip((self._seen, self._right, self._rate), acceptance, strict=True):
            counts[table].copy_(torch.from_numpy(array))
