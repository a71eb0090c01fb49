"""Tree verification in vLLM's V1 model runner: positions of nodes, sampling, and acceptance.

The scheduler handles a request with n draft tokens, of which some are accepted; it has no notion of trees. Two methods
of the runner instance are wrapped, its class remains unchanged:

- after ``_prepare_inputs``, nodes get positions by their depth; their slots in the cache are unchanged;
- in place of ``_sample``, a token is sampled at every node, and the sampled tokens are followed along the tree. Outputs
  therefore have the distribution of plain decoding at any temperature, top-k and top-p. The keys and values of accepted
  tokens are then moved, in every layer, to the slots where a chain would have stored them.

Requests whose sampling depends on the path (penalties, grammars, ...) or which ask for log-probabilities get chains as
drafts and are sampled by vLLM.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .....plugins.contracts import ROOT, DraftTree
from .....plugins.drafting.tree import accept_sampled_path, is_chain, node_depths, tree_attention_mask, truncate_tree
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
        """Wrap the runner's methods."""
        runner = self._runner
        prepare, sample = runner._prepare_inputs, runner._sample

        def _prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare(scheduler_output, *args, **kwargs)
            self._schedule_trees(scheduler_output.scheduled_spec_decode_tokens)
            return prepared

        def _sample(logits: Any, spec_decode_metadata: Any) -> Any:
            if not self._scheduled or spec_decode_metadata is None or logits is None:
                return sample(logits, spec_decode_metadata)
            return self._verify(logits, spec_decode_metadata, sample)

        runner._prepare_inputs = _prepare_inputs
        runner._sample = _sample

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
        return self._has_path_independent_sampling(request) and bool(self.builders)

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

    def _verify(self, logits: torch.Tensor, metadata: Any, sample: Any) -> Any:
        """Sample at every query token, accept along each tree or chain, and move keys and values of accepted tokens."""
        from vllm.v1.outputs import SamplerOutput

        batch = self._runner.input_batch
        drafted = list(metadata.num_draft_tokens)
        others = [
            i
            for i, request in enumerate(batch.req_ids[: len(drafted)])
            if not self._has_path_independent_sampling(request)
        ]
        seeded = batch.sampling_metadata.generators
        states_before = {i: seeded[i].get_state() for i in others if i in seeded}
        sampled = sample_rows(logits.clone() if others else logits, metadata, batch.sampling_metadata)
        if others:
            # vLLM samples these requests, with their generators as before. Its samples of the remaining requests are
            # overwritten, and their generators restored.
            for i, state in states_before.items():
                seeded[i].set_state(state)
            states = {i: g.get_state() for i, g in seeded.items() if i not in others}
            result = sample(logits, metadata)
            for i, state in states.items():
                seeded[i].set_state(state)
            output = result.sampled_token_ids
        else:
            output = torch.full((len(drafted), metadata.max_spec_len + 1), -1, dtype=torch.int32, device=logits.device)
            result = SamplerOutput(sampled_token_ids=output, logprobs_tensors=None)
        drafts = metadata.draft_token_ids.tolist()
        source: list[int] = []
        target: list[int] = []
        row = draft = 0
        for i, d in enumerate(drafted):
            if i not in others:
                scheduled = self._scheduled.get(i)
                parents = list(range(ROOT, d - 1)) if scheduled is None else scheduled.tree.parents.tolist()
                path, tokens = accept_sampled_path(drafts[draft : draft + d], parents, sampled[row : row + d + 1])
                output[i] = -1
                output[i, : len(tokens)] = torch.tensor(tokens, dtype=output.dtype, device=output.device)
                if scheduled is not None:
                    moves = [(node, at) for at, node in enumerate(path) if node != at]
                    source += [scheduled.first + 1 + node for node, _ in moves]
                    target += [scheduled.first + 1 + at for _, at in moves]
            row, draft = row + d + 1, draft + d
        if source:
            self.num_moved_tokens += len(source)
            for builder in self.builders:
                builder.move_kv(source, target)
        return result

    def _has_path_independent_sampling(self, request: str) -> bool:
        return has_path_independent_sampling(self._runner.requests[request].sampling_params)


def sample_rows(logits: torch.Tensor, metadata: Any, sampling: Any) -> list[int]:
    """Sample a token from the model's distribution at every query token; seeded requests use their own generators.

    Args:
        logits: [rows, vocabulary] logits of the query tokens; overwritten.
        metadata: vLLM's `SpecDecodeMetadata` of the step.
        sampling: vLLM's `SamplingMetadata` of the batch.

    Returns:
        [rows] sampled token ids.
    """
    from vllm.v1.sample.rejection_sampler import apply_sampling_constraints

    greedy = None if sampling.all_random else logits.argmax(-1)
    if sampling.all_greedy:
        assert greedy is not None
        return greedy.tolist()
    constrained = apply_sampling_constraints(logits.float(), metadata.cu_num_sampled_tokens, sampling)
    probs = constrained.softmax(-1, dtype=torch.float32)
    noise = torch.empty_like(probs).exponential_()
    counts = [d + 1 for d in metadata.num_draft_tokens]
    first = 0
    for i, count in enumerate(counts):
        if (generator := sampling.generators.get(i)) is not None:
            noise[first : first + count].exponential_(generator=generator)
        first += count
    sampled = probs.div_(noise).argmax(-1)
    if greedy is not None:
        is_greedy = torch.repeat_interleave(sampling.temperature < 1e-5, torch.tensor(counts, device=logits.device))
        sampled = torch.where(is_greedy, greedy, sampled)
    return sampled.tolist()


def has_path_independent_sampling(params: Any) -> bool:
    """Return whether a request asks for tokens only and samples by logits, temperature, top-k and top-p alone.

    vLLM rejects min-p and logit bias with any speculative method.
    """
    if params is None:
        return False
    wants = ("logprobs", "bad_words", "allowed_token_ids", "logit_bias", "structured_outputs", "logprob_token_ids")
    wants += ("min_tokens", "presence_penalty", "frequency_penalty", "min_p", "thinking_token_budget")
    asked = any(getattr(params, name, None) not in (None, 0, [], {}) for name in wants)
    return not asked and params.logprobs is None and params.repetition_penalty == 1.0
