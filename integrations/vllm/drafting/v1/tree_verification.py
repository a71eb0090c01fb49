"""Tree verification in vLLM's V1 model runner: positions of nodes, and the cache after acceptance.

The scheduler handles a request with n draft tokens, of which some are accepted; it has no notion of trees. After the
runner's ``_prepare_inputs``, nodes get positions by their depth; their slots in the cache are unchanged. Tokens are
sampled along each tree (see `sampling`). The keys and values of accepted tokens are then moved, in every layer, to the
slots where a chain would have stored them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .....plugins.contracts import DraftTree
from .....plugins.drafting.tree import is_chain, node_depths, tree_attention_mask, truncate_tree
from ...attention.tree.common import ScheduledTree
from ...engine import log


class TreeVerifier:
    """Tree verification on one model runner; one instance on every tensor-parallel rank.

    Attributes:
        num_moved_tokens: Number of accepted tokens whose keys and values were moved.
    """

    def __init__(self, runner: Any, plugin: str, tp: Any = None) -> None:
        """Initialise without changing the runner.

        Args:
            runner: vLLM's model runner.
            plugin: Name of the drafter, for messages.
            tp: vLLM's group of tensor-parallel ranks; None for one rank.
        """
        self._runner, self._plugin, self._tp = runner, plugin, tp
        self._trees: dict[str, DraftTree] = {}  # request -> draft for its next step
        self._scheduled: dict[int, ScheduledTree] = {}  # batch index -> tree in the current step
        self._builders: list[Any] | None = None
        self._announced = False
        self.num_moved_tokens = 0

    def attach(self) -> None:
        """Wrap the runner's ``_prepare_inputs`` on this instance; its class remains unchanged."""
        runner = self._runner
        prepare = runner._prepare_inputs

        def _prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare(scheduler_output, *args, **kwargs)
            self._schedule_trees(scheduler_output.scheduled_spec_decode_tokens)
            return prepared

        runner._prepare_inputs = _prepare_inputs

    @property
    def builders(self) -> list[Any]:
        """Builders of attention metadata, which hold the KV caches; empty if trees cannot be verified."""
        if self._builders is None:
            groups = [group for groups in self._runner.attn_groups for group in groups]
            self._builders = [builder for group in groups for builder in group.metadata_builders]
            unsupported = [type(b).__name__ for b in self._builders if not hasattr(b, "scheduled_trees")]
            errors = [f"{unsupported[0]} does not support trees"] if unsupported else [b.error for b in self._builders]
            if self._tp is not None and self._tp.world_size > 1:  # if one rank cannot verify trees, none does
                everywhere: list[Any] = [None] * self._tp.world_size
                torch.distributed.all_gather_object(everywhere, errors, group=self._tp.cpu_group)
                errors = [error for rank in everywhere for error in rank]
            if reason := next(filter(None, errors), None):
                log.logger.warning(
                    "pilotfish: %s: trees are NOT verified, chains are used instead: %s", self._plugin, reason
                )
                self._builders = []
        return self._builders

    def can_verify_tree(self, request: str) -> bool:
        """Return whether a tree can be verified for a request; otherwise a chain can."""
        return takes_trees(self._runner.requests[request].sampling_params) and bool(self.builders)

    def set_drafts(self, drafts: Mapping[str, DraftTree]) -> None:
        """Store the drafts for the next step; each is kept until it is replaced or its request ends.

        A request may not be scheduled in the next step; its draft is then verified in a later one.
        """
        waiting = {r: tree for r, tree in self._trees.items() if r in self._runner.requests}
        self._trees = {**waiting, **drafts}

    def tree_of(self, index: int) -> DraftTree | None:
        """Return the tree of the request at a batch index in the current step; None for a chain or no draft."""
        scheduled = self._scheduled.get(index)
        return None if scheduled is None else scheduled.tree

    # -------------------------------------------------------------------------------------- before the forward pass

    def _schedule_trees(self, scheduled: Mapping[str, list[int]]) -> None:
        """Find the trees among the scheduled drafts, and set the positions of their nodes by depth."""
        runner, self._scheduled = self._runner, {}
        # Set on every rank, otherwise some would propose no drafts near the end of the context (see `RunnerBinding`).
        runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens + 2
        if not self.builders:
            return
        starts = runner.query_start_loc.np
        for request, tokens in scheduled.items():
            tree = self._trees.pop(request, None)
            if tree is None or len(tokens) > len(tree) or tree.tokens[: len(tokens)].tolist() != list(tokens):
                continue
            tree = truncate_tree(tree, len(tokens))  # the scheduler may have cut the draft
            if is_chain(tree.parents):
                continue
            index = runner.input_batch.req_id_to_index[request]
            first = int(starts[index + 1]) - len(tree) - 1
            position = int(runner.positions[first])
            depths = torch.from_numpy(node_depths(tree.parents).astype(np.int64))
            runner.positions[first + 1 : first + 1 + len(tree)] = (position + depths).to(runner.positions.device)
            self._scheduled[index] = ScheduledTree(index, first, position, tree, tree_attention_mask(tree.parents))
        for builder in self.builders:
            builder.scheduled_trees = list(self._scheduled.values())
        if self._scheduled and not self._announced:
            self._announced = True
            nodes = max(len(scheduled_tree.tree) for scheduled_tree in self._scheduled.values())
            log.logger.info("pilotfish: trees are verified, the first has %d nodes", nodes)

    # --------------------------------------------------------------------------------------- after the forward pass

    def move_accepted(self, accepted: Sequence[Sequence[int]]) -> None:
        """Move the keys and values of accepted nodes to the slots where a chain would have stored them.

        Args:
            accepted: Accepted nodes of each request from the root down, in batch order.
        """
        source: list[int] = []
        target: list[int] = []
        for index, scheduled in self._scheduled.items():
            first = scheduled.first + 1
            moves = [(first + node, first + at) for at, node in enumerate(accepted[index]) if node != at]
            source += [node for node, _ in moves]
            target += [at for _, at in moves]
        if source:
            self.num_moved_tokens += len(source)
            for builder in self.builders:
                builder.move_kv(source, target)


def takes_trees(params: Any) -> bool:
    """Return whether a request can be verified along a tree: vLLM masks the rows of a grammar along a chain."""
    return params is not None and params.structured_outputs is None
