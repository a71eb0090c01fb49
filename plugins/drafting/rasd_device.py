"""RASD with its texts, counts and drafts on the device; see `rasd`.

Of each source, the continuations of the longest match are found as on the host; a datastore is on the device too. They
are fused with the rows of Token Recycling's table along one chain, see `fusion_triton`. A tree consists of this chain
and of candidates of the table.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton

from ..contracts import DeviceBatch, DeviceDrafter, DeviceLimits
from . import acceptance_counts, fusion_triton
from .adjacency_table import NONE
from .adjacency_triton import BEAMS, MAX_CHAIN_DEPTH, DeviceAdjacencyTables
from .datastore_triton import DatastoreSearch
from .history_triton import DeviceHistory, SuffixSearch
from .token_recycling_device import DeviceTokenRecycling

if TYPE_CHECKING:
    from torch import Tensor

    from ..rasd import RASDOptions
    from .datastore import Datastore
BLOCK = 256  # elements of a program
HALVE_INTERVAL = 64  # steps after which large counts are halved: float32 counts further, exactly


class DeviceRASD(DeviceDrafter):
    """Drafts chains or trees from retrieved text, fused with the tables of Token Recycling, on the device.

    Args:
        options: Options of RASD.
        base: Token Recycling on the device; None for none.
        limits: Sizes for which memory is allocated.
        prompt_context: Number of tokens from the end of a prompt that are kept with its output.
        datastore: Datastore that is copied to the device; None for none.
    """

    def __init__(
        self,
        options: "RASDOptions",
        base: DeviceTokenRecycling | None,
        limits: DeviceLimits,
        prompt_context: int,
        datastore: "Datastore | None" = None,
    ) -> None:
        self.options, self._base, self._prompt_context = options, base, prompt_context
        if base is not None:
            self.candidates, self.state_path = base.candidates, base.state_path
        device, reqs, steps = limits.device, limits.max_num_reqs, limits.num_speculative_tokens
        self._steps = min(steps, MAX_CHAIN_DEPTH) if limits.trees else steps  # of the chain
        self._outputs = DeviceHistory(options.outputs, device) if options.outputs else None
        sizes = reqs, limits.max_model_len, options.max_match, options.min_match, device
        self._history_search = SuffixSearch(options.request, self._outputs, *sizes)
        self._datastore_search = (
            None if datastore is None else DatastoreSearch(datastore, options.max_match, options.min_match, device)
        )

        def ids(*shape: int) -> "Tensor":
            return torch.full(shape, NONE, dtype=torch.int32, device=device)

        sources = self._history_search.sources + (datastore is not None)
        self._followers = ids(sources, reqs, options.max_occurrences, self._steps)
        self._lengths = ids(sources, reqs).zero_()
        self._predicted, self._cells = ids(reqs, sources + 1, self._steps), ids(reqs, sources + 1, self._steps)
        self._chains = ids(reqs, self._steps)
        self._drafts = torch.zeros(reqs, self._steps, dtype=torch.int64, device=device)
        self._scores = self.scores = torch.zeros(reqs, self._steps, dtype=torch.float32, device=device)
        self._trees = _TreeBuffers.make(reqs, steps, device) if limits.trees else None
        self.parents = None if self._trees is None else self._trees.parents
        counts = acceptance_counts.make_acceptance_counts(sources)
        self._num_verified, self._num_accepted = (torch.from_numpy(c).to(device) for c in counts)
        self._edges = [
            torch.from_numpy(_padded(edges, filler)).to(device)
            for edges, filler in (
                (acceptance_counts.LENGTHS, np.iinfo(np.int32).max),
                (acceptance_counts.SHARES, -np.inf),
                (acceptance_counts.CONDITIONALS, np.inf),
            )
        ]
        self._has_predictions = False  # of the last step
        self._counted_steps = 0
        self._prompt_lens: dict[int, int] = {}
        # Without a base drafter the kernel gets tables that it does not read.
        self._tables = DeviceAdjacencyTables(1, 1, 1, 1, 1, reqs, device) if base is None else base.tables

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the drafter holds."""
        own = self._followers, self._lengths, self._predicted, self._cells, self._chains, self._drafts, self._scores
        own += self._trees or ()
        outputs = 0 if self._outputs is None else self._outputs.ring.nbytes
        base = 0 if self._base is None else self._base.nbytes
        datastore = 0 if self._datastore_search is None else self._datastore_search.nbytes
        return base + outputs + sum(t.nbytes for t in own) + self._history_search.nbytes + datastore

    def start(self, req_idx: int, prompt: "Tensor", tenant: str | None = None) -> None:
        """Start to draft for a request."""
        if self._base is not None:
            self._base.start(req_idx, prompt, tenant)
        self._prompt_lens[req_idx] = len(prompt)
        self._predicted[req_idx].fill_(NONE)

    def observe(self, batch: DeviceBatch) -> None:
        """Count which retrieved tokens were accepted."""
        if self._base is not None:
            self._base.observe(batch)
        if not self._has_predictions:
            self._predicted.fill_(NONE)
            return
        self._has_predictions = False
        fusion_triton.count_predictions_kernel[(batch.num_requests,)](
            *batch.texts,
            batch.num_sampled,
            self._predicted,
            self._cells,
            self._chains,
            self._num_verified,
            self._num_accepted,
            PREDICTORS=len(self._lengths) + 1,
            PREDICTORS_PADDED=triton.next_power_of_2(len(self._lengths) + 1),
            NUM_SPEC_TOKENS=self._steps,
        )
        self._counted_steps += 1
        if self._counted_steps % HALVE_INTERVAL == 0:
            size = self._num_verified.numel()
            fusion_triton.halve_counts_kernel[(triton.cdiv(size, BLOCK),)](
                self._num_verified, self._num_accepted, size, BLOCK=BLOCK
            )

    def propose(self, batch: DeviceBatch) -> "Tensor":
        """Return for each request the continuations retrieved for it, fused with the base drafter's candidates."""
        self._has_predictions = True
        drafts, scores = self._drafts[: batch.num_requests], self._scores[: batch.num_requests]
        if self._history_search.sources:
            self._history_search.find(batch, self._followers, self._lengths)
        if self._datastore_search is not None:
            self._datastore_search.find(batch, self._followers[-1], self._lengths[-1])
        sources = len(self._lengths)
        fusion_triton.fuse_chains_kernel[(batch.num_requests,)](
            *batch.texts,
            self._followers,
            self._lengths,
            *self._tables.arguments,
            self._num_verified,
            self._num_accepted,
            *self._edges,
            self._predicted,
            self._cells,
            self._chains,
            drafts,
            scores,
            self._lengths.shape[1],
            self.options.prune,
            SOURCES=sources,
            SOURCES_PADDED=triton.next_power_of_2(sources),
            MOST=self.options.max_occurrences,
            MOST_PADDED=triton.next_power_of_2(self.options.max_occurrences),
            NUM_SPEC_TOKENS=self._steps,
            NUM_SPEC_TOKENS_PADDED=triton.next_power_of_2(self._steps),
            BEAMS=BEAMS,
            HAS_BASE=self._base is not None,
            BASE_DRAFTS=self._base is not None and self._trees is None,
            BASE_FEEDBACK=self.options.base_feedback,
            FUSE=self.options.fuse,
            PREDICTIONS_PADDED=triton.next_power_of_2((sources + 1) * self._steps),
            LENGTH_EDGES_PADDED=len(self._edges[0]),
            SHARE_EDGES_PADDED=len(self._edges[1]),
            **self._tables.constants,
        )
        self.scores = scores
        if self._trees is None:
            return drafts
        tree, self.scores, self.parents = (buffer[: batch.num_requests] for buffer in self._trees)
        self._tables.propose_trees(batch, tree, self.parents, self.scores, chain=(drafts, scores))
        return tree

    def finish(self, req_idx: int, text: "Tensor", total_len: "Tensor") -> None:
        """Forget the request; its output is kept as a source for other requests."""
        if self._base is not None:
            self._base.finish(req_idx, text, total_len)
        prompt_len = self._prompt_lens.pop(req_idx, None)
        if prompt_len is not None and self._outputs is not None:
            self._outputs.append(text, max(prompt_len - self._prompt_context, 0), total_len)

    def save(self, path: Path) -> None:
        """Write the base drafter's state."""
        if self._base is not None:
            self._base.save(path)


class _TreeBuffers(NamedTuple):
    drafts: "Tensor"
    scores: "Tensor"
    parents: "Tensor"

    @classmethod
    def make(cls, max_num_reqs: int, num_nodes: int, device: torch.device) -> "_TreeBuffers":
        """Allocate buffers [max_num_reqs, num_nodes] for the trees of a step."""
        dtypes = torch.int64, torch.float32, torch.int32
        return cls(*(torch.zeros(max_num_reqs, num_nodes, dtype=dtype, device=device) for dtype in dtypes))


def _padded(edges: np.ndarray, filler: float) -> np.ndarray:
    """Return edges of bins with a power of two of elements; none of the further ones is ever reached."""
    return np.pad(edges, (0, triton.next_power_of_2(len(edges)) - len(edges)), constant_values=filler)
