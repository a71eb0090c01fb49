"""Tree verification in vLLM's V1 model runner: where the nodes stand, what is drawn at them, what is accepted.

The scheduler sees a request with n drafted tokens, of which some are accepted, and nothing of a tree. On the runner
(one instance, its class stays as it is) two methods are wrapped:

- behind ``_prepare_inputs``, nodes get the positions of their depth; their slots in the cache stay as they are;
- in place of ``_sample``, a token is drawn at every node and the tree walked along the draws. So outputs have the
  distribution of plain decoding at any temperature, top-k and top-p. What was accepted is then moved to the slots
  where a chain would have left it, in every layer.

Requests whose sampling depends on the path (penalties, grammars, ...) or which ask for log-probabilities are drafted
chains, and sampled by vLLM.
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
    """Our hold on one model runner, on every tensor-parallel rank."""

    def __init__(self, runner: Any, plugin: str, tp: Any = None) -> None:
        """Hold a runner.

        Args:
            runner: vLLM's.
            plugin: Name of the drafter, for messages.
            tp: vLLM's group of tensor-parallel ranks; None for one rank.
        """
        self._runner, self._plugin, self._tp = runner, plugin, tp
        self._trees: dict[str, DraftTree] = {}  # request -> what was drafted for its next step
        self._scheduled: dict[int, ScheduledTree] = {}  # index in the batch -> what its step verifies
        self._builders: list[Any] | None = None
        self._announced = False
        self.num_moved_tokens = 0  # tokens that were not where they belong

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
        """The builders of attention metadata, which know the caches; empty when trees cannot be verified."""
        if self._builders is None:
            groups = [group for groups in self._runner.attn_groups for group in groups]
            self._builders = [builder for group in groups for builder in group.metadata_builders]
            strange = [type(b).__name__ for b in self._builders if not hasattr(b, "scheduled_trees")]
            errors = [f"{strange[0]} knows no trees"] if strange else [b.error for b in self._builders]
            if self._tp is not None and self._tp.world_size > 1:  # where one rank cannot, none does
                everywhere: list[Any] = [None] * self._tp.world_size
                torch.distributed.all_gather_object(everywhere, errors, group=self._tp.cpu_group)
                errors = [error for rank in everywhere for error in rank]
            if reason := next(filter(None, errors), None):
                log.logger.warning(
                    "pilotfish: %s: trees are NOT verified, chains are drafted instead: %s", self._plugin, reason
                )
                self._builders = []
        return self._builders

    def can_verify_tree(self, request: str) -> bool:
        """Whether a tree can be verified for a request; if not, a chain can."""
        return self._has_path_independent_sampling(request) and bool(self.builders)

    def set_drafts(self, drafts: Mapping[str, DraftTree]) -> None:
        """Remember what was drafted for next steps, until something else is or the request ends.

        A step may pass a request by, whose draft then comes in a later one.
        """
        waiting = {r: tree for r, tree in self._trees.items() if r in self._runner.requests}
        self._trees = {**waiting, **drafts}

    def tree_of(self, index: int) -> DraftTree | None:
        """The tree that the step under way verifies for a request, by its index; None for a chain or nothing."""
        placed = self._scheduled.get(index)
        return None if placed is None else placed.tree

    # -------------------------------------------------------------------------------------------- before the model

    def _schedule_trees(self, scheduled: Mapping[str, list[int]]) -> None:
        """Find the trees among what was scheduled, and give their nodes the positions of their depth."""
        runner, self._scheduled = self._runner, {}
        # On every rank alike, or some would not be asked for drafts near the end of the context (see `RunnerBinding`).
        runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens + 2
        if not self.builders:
            return
        starts = runner.query_start_loc.np
        for request, tokens in scheduled.items():
            tree = self._trees.pop(request, None)
            if tree is None or len(tokens) > len(tree) or tree.tokens[: len(tokens)].tolist() != list(tokens):
                continue
            tree = truncate_tree(tree, len(tokens))  # the scheduler may have had no room for all of it
            if is_chain(tree.parents):
                continue
            index = runner.input_batch.req_id_to_index[request]
            first = int(starts[index + 1]) - len(tree) - 1
            position = int(runner.positions[first])
            below = torch.from_numpy(node_depths(tree.parents).astype(np.int64))
            runner.positions[first + 1 : first + 1 + len(tree)] = (position + below).to(runner.positions.device)
            self._scheduled[index] = ScheduledTree(index, first, position, tree, tree_attention_mask(tree.parents))
        for builder in self.builders:
            builder.scheduled_trees = list(self._scheduled.values())
        if self._scheduled and not self._announced:
            self._announced = True
            nodes = max(len(placed.tree) for placed in self._scheduled.values())
            log.logger.info("pilotfish: trees are verified, the first has %d nodes", nodes)

    # -------------------------------------------------------------------------------------------- behind the model

    def _verify(self, logits: torch.Tensor, metadata: Any, sample: Any) -> Any:
        """Draw at every row, walk each request's tree or chain, move what was accepted."""
        from vllm.v1.outputs import SamplerOutput

        batch = self._runner.input_batch
        drafted = list(metadata.num_draft_tokens)
        others = [
            i
            for i, request in enumerate(batch.req_ids[: len(drafted)])
            if not self._has_path_independent_sampling(request)
        ]
        seeded = batch.sampling_metadata.generators
        theirs = {i: seeded[i].get_state() for i in others if i in seeded}
        drawn = sample_rows(logits.clone() if others else logits, metadata, batch.sampling_metadata)
        if others:  # vLLM's, with the seeds they had; what it samples for the rest is overwritten, their seeds set back
            for i, state in theirs.items():
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
                placed = self._scheduled.get(i)
                parents = list(range(ROOT, d - 1)) if placed is None else placed.tree.parents.tolist()
                path, tokens = accept_sampled_path(drafts[draft : draft + d], parents, drawn[row : row + d + 1])
                output[i] = -1
                output[i, : len(tokens)] = torch.tensor(tokens, dtype=output.dtype, device=output.device)
                if placed is not None:
                    astray = [(node, at) for at, node in enumerate(path) if node != at]
                    source += [placed.first + 1 + node for node, _ in astray]
                    target += [placed.first + 1 + at for _, at in astray]
            row, draft = row + d + 1, draft + d
        if source:
            self.num_moved_tokens += len(source)
            for builder in self.builders:
                builder.move_kv(source, target)
        return result

    def _has_path_independent_sampling(self, request: str) -> bool:
        return has_path_independent_sampling(self._runner.requests[request].sampling_params)


def sample_rows(logits: torch.Tensor, metadata: Any, sampling: Any) -> list[int]:
    """A token from the model's distribution at every row, [rows]; seeded requests use their own generators.

    Args:
        logits: [rows, vocabulary]; overwritten.
        metadata: vLLM's, of the step's drafts.
        sampling: vLLM's, of the batch's requests.
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
    drawn = probs.div_(noise).argmax(-1)
    if greedy is not None:
        cold = torch.repeat_interleave(sampling.temperature < 1e-5, torch.tensor(counts, device=logits.device))
        drawn = torch.where(cold, greedy, drawn)
    return drawn.tolist()


def has_path_independent_sampling(params: Any) -> bool:
    """Whether a request's distribution at a node depends on its logits, temperature, top-k and top-p alone.

    And whether nothing but tokens is asked for. vLLM refuses min-p and a bias of logits with any speculation.
    """
    if params is None:
        return False
    wants = ("logprobs", "bad_words", "allowed_token_ids", "logit_bias", "structured_outputs", "logprob_token_ids")
    wants += ("min_tokens", "presence_penalty", "frequency_penalty", "min_p", "thinking_token_budget")
    asked = any(getattr(params, name, None) not in (None, 0, [], {}) for name in wants)
    return not asked and params.logprobs is None and params.repetition_penalty == 1.0
