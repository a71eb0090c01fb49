"""Token Recycling with its adjacency tables and drafts on the device; see `token_recycling`."""

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..contracts import DeviceBatch, DeviceDrafter, DeviceLimits, Engine
from . import adjacency_state
from .adjacency_triton import DeviceAdjacencyTables

if TYPE_CHECKING:
    from torch import Tensor

    from ..token_recycling import TokenRecyclingOptions


class DeviceTokenRecycling(DeviceDrafter):
    """Drafts chains or trees from the top-k tokens of previous steps, on the device.

    Args:
        options: Options of Token Recycling.
        engine: Facts about the engine.
        limits: Sizes for which memory is allocated.

    Attributes:
        tables: The adjacency tables.
    """

    def __init__(self, options: "TokenRecyclingOptions", engine: Engine, limits: DeviceLimits) -> None:
        self.options, self.engine = options, engine
        self.candidates, self.state_path = options.k, options.state_path
        # Every running request may have its own table.
        count = {"engine": 1, "tenant": max(options.max_tables, limits.max_num_reqs), "request": limits.max_num_reqs}
        num_tables = count[options.share]
        self.tables = DeviceAdjacencyTables(
            engine.vocab_size, options.k, options.order, options.bits, num_tables, limits.max_num_reqs, limits.device
        )
        self._table_of: OrderedDict[str, int] = OrderedDict()  # key of a group -> its table, the latest used last
        self._key_of_request: dict[int, str] = {}
        self._free = list(range(num_tables))
        shape = limits.max_num_reqs, limits.num_speculative_tokens
        self._drafts = torch.zeros(shape, dtype=torch.int64, device=limits.device)
        self._scores = self.scores = torch.zeros(shape, dtype=torch.float32, device=limits.device)
        self._parents = torch.zeros(shape, dtype=torch.int32, device=limits.device) if limits.trees else None
        self.parents = self._parents
        if options.state_path is not None and Path(options.state_path).exists():
            self.tables.from_host(0, *adjacency_state.read_state(Path(options.state_path), options, engine))

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the drafter holds."""
        parents = 0 if self._parents is None else self._parents.nbytes
        return self.tables.nbytes + self._drafts.nbytes + self._scores.nbytes + parents

    def start(self, req_idx: int, prompt: "Tensor", tenant: str | None = None) -> None:
        """Assign the request its table, and prime it from the prompt."""
        share = self.options.share
        key = "" if share == "engine" else f"tenant {tenant}" if share == "tenant" and tenant else f"request {req_idx}"
        self._key_of_request[req_idx] = key
        table = self._table(key)
        self.tables.table_of_request[req_idx].fill_(table)
        if self.options.prime:
            self.tables.prime_from_text(table, prompt)

    def finish(self, req_idx: int, text: "Tensor", total_len: "Tensor") -> None:
        """Forget the request, and its table if no other request can use it."""
        del text, total_len
        key = self._key_of_request.pop(req_idx, None)
        if key is not None and key.startswith("request "):
            self._free.append(self._table_of.pop(key))

    def _table(self, key: str) -> int:
        """Return the table of a group of requests; a new group gets an empty one."""
        if key in self._table_of:
            self._table_of.move_to_end(key)
            return self._table_of[key]
        if not self._free:  # there are at least as many tables as running requests, so one is idle
            in_use = set(self._key_of_request.values())
            idle = next(k for k in self._table_of if k not in in_use)
            self._free.append(self._table_of.pop(idle))
        table = self._table_of[key] = self._free.pop()
        if key:  # the table of all requests may hold what the state file held
            self.tables.clear(table)
        return table

    def observe(self, batch: DeviceBatch) -> None:
        """Update acceptance rates from the accepted tokens, then update the tables for all verified positions."""
        self.tables.update(batch)

    def propose(self, batch: DeviceBatch) -> "Tensor":
        """Propose for each request the chain or tree of the largest expected number of accepted tokens."""
        drafts, self.scores = self._drafts[: batch.num_requests], self._scores[: batch.num_requests]
        if self._parents is None:
            self.tables.propose_chains(batch, drafts, self.scores)
        else:
            self.parents = self._parents[: batch.num_requests]
            self.tables.propose_trees(batch, drafts, self.parents, self.scores)
        return drafts

    def save(self, path: Path) -> None:
        """Write the shared table atomically."""
        adjacency_state.write_state(path, self.options, self.engine, *self.tables.to_host(0))
