"""The proposer that vLLM constructs for ``--speculative-config '{"method": "custom_class", ...}'``.

It connects vLLM's model runner with a registered `contracts.Drafter`: passes it the results of every step, asks it for
trees, and has the part of each tree verified that the step-cost model finds worthwhile: its best root-to-leaf path, or
the tree itself (see `tree_verification`).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm.distributed import get_tp_group

from .....plugins.config import ConfigError
from .....plugins.contracts import ROOT, Candidates, DraftBudget, DraftRequest, DraftTree
from .....plugins.contracts import Drafter as DrafterPlugin
from .....plugins.drafting.draft_length import AcceptanceRecord, StepCostModel, allocate_draft_tokens
from .....plugins.drafting.tree import sort_by_score, truncate_tree
from .....plugins.manager import disabled
from ...engine import log
from ...engine.selection import attach
from .. import compatibility, step_times
from ..request_options import accepts_drafts, tenant_of
from ..state_saver import StateSaver
from .model_runner import RunnerBinding, Verified, find_runner
from .sampling import replace_rejection_sampler, takes_drafts
from .tree_verification import TreeVerifier

logger = log.logger

# vLLM computes the logits of all tokens that a step verifies, and its memory profile does not include them.
LOGITS_BYTES = 1 << 29
NODES_PER_TOKEN = 4  # tree nodes requested per token of a verified path


@dataclass
class _LiveRequest:
    """State of a running request.

    Attributes:
        wanted: Whether the request accepts drafts.
        record: Acceptance of its drafts so far.
        draft: Its last draft.
        length: Length of its text after the last observed step; negative before the first.
    """

    wanted: bool
    record: AcceptanceRecord = field(default_factory=AcceptanceRecord)
    draft: DraftTree | None = None
    length: int = -1

    def record_step(self, verified: Verified) -> None:
        """Record how many tokens of the last draft, or of its verified part, were accepted."""
        self.length = len(verified.text)
        if self.draft is None or not len(verified.tokens):
            return
        draft = truncate_tree(self.draft, len(verified.candidates.inputs) - 1)
        self.draft = None
        same = np.array_equal(draft.tokens, verified.candidates.inputs[1:])
        if same and np.array_equal(draft.parents, verified.candidates.parents[1:] - 1):
            self.record.observe(draft.scores, len(verified.tokens) - 1)

    def missed_steps(self, verified: Verified) -> bool:
        """Return whether steps were not observed, as happens near the end of a draft model's context in vLLM."""
        return 0 <= self.length != len(verified.text) - len(verified.tokens)


class PilotfishProposer:
    """Custom proposer of vLLM that calls a drafter; see `vllm.v1.spec_decode.custom_class_proposer`.

    Args:
        vllm_config: vLLM's configuration of the engine.

    Attributes:
        trees: Tree verification; None if chains are verified.
        plugin: The drafter; None on all ranks but the first, and if plugins are disabled.
        cost: Cost model of a step.
        counts: Totals over all steps.
    """

    def __init__(self, vllm_config: Any) -> None:
        drafting = None if disabled() else attach("drafter", vllm_config)
        if drafting is not None:
            compatibility.check(drafting, vllm_config)
        self.trees: TreeVerifier | None = None
        self._drafting = drafting
        self.plugin: DrafterPlugin | None = None
        self.cost = StepCostModel()
        self.counts = {"steps": 0, "proposals": 0, "proposed_tokens": 0, "seconds": 0.0, "requests": 0}
        self._requests: dict[str, _LiveRequest] = {}
        self._step_ended: float | None = None
        self._last_batch: set[str] = set()
        if drafting is None:  # PILOTFISH_DISABLE is set: the proposer proposes nothing
            return
        runner = find_runner()
        if runner is None:
            raise ConfigError(
                "pilotfish.drafter: constructed outside of vLLM's V1 model runner; select the drafter with "
                "`pilotfish serve`, or set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        self._runner = runner
        self._verification = drafting.config.verification
        if self._verification.verification == "tree":
            self.trees = TreeVerifier(runner, drafting.name, get_tp_group())
        self._tp = get_tp_group()
        if self._tp.rank_in_group != 0:  # the scheduler uses drafts of the first rank only
            return
        self._most = drafting.engine.num_speculative_tokens
        self._most_in_step = max(self._most, LOGITS_BYTES // (4 * drafting.engine.vocab_size))
        self._depth = self._most if self.trees is None else min(self._most, drafting.cls.default_depth)  # type: ignore[attr-defined]
        plugin: DrafterPlugin = drafting.cls(drafting.options, drafting.engine)
        self.plugin = plugin
        path = plugin.state_path
        self._saver = None if path is None else StateSaver(plugin, Path(path))
        self._binding = RunnerBinding(runner, plugin.candidates)
        self._active = False
        how = f"proposer, up to {self._most} draft tokens per step, verified as a {self._verification.verification}"
        logger.info(log.start_up_table("drafter", drafting, how))

    def load_model(self, target_model: Any) -> None:
        """Compile our kernels and attach to the runner; vLLM calls it after loading the model."""
        del target_model
        if disabled() or self._drafting is None:
            return
        if self.trees is not None:
            self.trees.attach()
        replace_rejection_sampler(self._runner, self.trees)  # on every rank: all of them sample
        if self._verification.nodes is None:
            engine = self._drafting.engine
            step_times.measure_when_ready(
                self._runner, engine, engine.num_speculative_tokens + 1, self._use_latency_profile
            )
        if self.plugin is None:
            return
        self._warm_up(self._drafting.cls(self._drafting.options, self._drafting.engine))
        self._binding.attach(self._finish, self.close)

    def _use_latency_profile(self, times: step_times.StepTimes) -> None:
        """Pass measured step times to the cost model; a single size contains no information."""
        if len(times) > 1:
            self.cost.set_latency_profile(list(times), list(times.values()))

    @staticmethod
    def _warm_up(plugin: DrafterPlugin) -> None:
        """Run every compiled kernel once, on a separate instance, so that no request waits for compilation."""
        name, text = "pilotfish-warm-up", np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)  # repeats, so there is a draft
        no_ids = np.full((1, 8), -1, np.int32)  # candidates from which no adjacency-matrix row learns
        candidates = Candidates(text[:-1], text[-1:], np.full(1, -1, np.int32), no_ids, np.zeros((1, 8), np.float32))
        plugin.start(name, text)
        for _ in range(2):  # the second iteration has a draft to learn from
            plugin.observe(name, text[2:3], candidates)
            plugin.propose([DraftRequest(name, text, 2)], DraftBudget(4, 2))
        plugin.finish(name)

    # --------------------------------------------------------------------------------------------------- each step

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
        drafted: list[list[int]] | None = None,
    ) -> list[list[int]]:
        """Return the draft tokens of each request of the batch; an empty list for a request without a draft.

        Args:
            sampled_token_ids: Accepted and sampled tokens of each request; none while its prompt is processed.
            num_tokens_no_spec: [b] length of each text, including those tokens.
            token_ids_cpu: [b, max_model_len] token ids of the texts.
            slot_mappings: Not used.
            drafted: Tokens that vLLM's draft model proposed for each request; None without a draft model.
        """
        del slot_mappings
        if self.plugin is None:
            if self.trees is not None:
                self.trees.set_drafts(self._tp.broadcast_object(None))
            return [[] for _ in sampled_token_ids]
        started = time.perf_counter()
        tree_of = None if self.trees is None else self.trees.tree_of
        verified = self._binding.step(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, tree_of)
        self._time_step(verified, started)
        for i, request in enumerate(verified):
            if request.request in self._requests and self._requests[request.request].missed_steps(request):
                self._finish(request.request)
            if request.request not in self._requests:
                self._start(request.request, i, request)
            self._requests[request.request].record_step(request)
            self.plugin.observe(request.request, request.tokens, request.candidates)
        drafts = self._draft(verified, drafted)
        if self._saver is not None:
            self._saver.touch()
        self._step_ended = time.perf_counter()
        self.counts["seconds"] += self._step_ended - started + self._binding.seconds
        self._binding.seconds = 0.0
        self.counts["steps"] += 1
        self.counts["requests"] += len(verified)
        return drafts

    def _draft(self, verified: list[Verified], drafted: list[list[int]] | None) -> list[list[int]]:
        """Ask the drafter for trees, and cut each to the size that the cost model allows."""
        assert self.plugin is not None
        drafts: list[list[int]] = [[] for _ in verified]
        pending = []
        for i, request in enumerate(verified):
            if len(request.tokens) and self._requests[request.request].wanted:
                limit = min(self._binding.free_slots(request.request, i, len(request.text)), self._most)
                proposed = np.array([] if drafted is None else drafted[i], np.int32)
                pending.append((i, DraftRequest(request.request, request.text, limit, proposed)))
        selected: dict[str, DraftTree] = {}
        if pending:
            nodes = NODES_PER_TOKEN * self._depth if self.trees is None else self._most
            proposed = self.plugin.propose([r for _, r in pending], DraftBudget(nodes, self._depth))
            trees = [self._verifiable(r, tree) for (_, r), tree in zip(pending, proposed, strict=True)]
            live = [self._requests[r.id] for _, r in pending]
            sizes = self._allocate(trees, live)
            for (i, request), tree, size, one in zip(pending, trees, sizes, live, strict=True):
                selected[request.id] = one.draft = truncate_tree(tree, size)
                drafts[i] = selected[request.id].tokens.tolist()
            total = sum(map(len, drafts))
            self.counts["proposals"] += sum(map(bool, drafts))
            self.counts["proposed_tokens"] += total
            if total and not self._active:
                self._active = True
                logger.info("pilotfish: drafter %s is active, its first draft has %d tokens", self.plugin.name, total)
        if self.trees is not None:
            self.trees.set_drafts(self._tp.broadcast_object(selected))
        return drafts

    def _verifiable(self, request: DraftRequest, tree: DraftTree) -> DraftTree:
        """Return the part of a tree that can be verified for the request: the whole tree, or its best path."""
        if self.trees is None or not self.trees.can_verify_tree(request.id):
            path = tree.best_path()
            tree = DraftTree(tree.tokens[path], np.arange(ROOT, len(path) - 1, dtype=np.int32), tree.scores[path])
        else:
            tree = sort_by_score(tree)
        return truncate_tree(tree, max(request.limit, 0))

    def _allocate(self, trees: list[DraftTree], live: "list[_LiveRequest]") -> list[int]:
        """Return how many nodes of each request's tree to verify."""
        if self._verification.nodes is not None:
            return [min(len(tree), self._verification.nodes) for tree in trees]
        if self.plugin is not None and self.plugin.fixed_size:
            return [len(tree) for tree in trees]
        return allocate_draft_tokens(
            [one.record.factor * t.scores for t, one in zip(trees, live, strict=True)], self.cost, self._most_in_step
        )

    def _time_step(self, verified: list[Verified], now: float) -> None:
        """Update the cost model with the time since the last step, if both steps only decoded."""
        rows = sum(len(v.candidates.inputs) for v in verified)
        batch = {v.request for v in verified}
        if self._step_ended is not None and batch <= self._last_batch and self._binding.is_decode_only(rows):
            self.cost.observe(len(verified), rows - len(verified), now - self._step_ended)
        self._last_batch = batch

    # ------------------------------------------------------------------------------------- start and end of requests

    def _start(self, request: str, index: int, seen: Verified) -> None:
        """Start a request in the drafter, with its text before the tokens of this step."""
        assert self.plugin is not None
        params = self._binding.sampling_params(request)
        self._requests[request] = _LiveRequest(accepts_drafts(params) and takes_drafts(params))
        prompt = self._binding.prompt(index)
        before = seen.text[: max(len(seen.text) - len(seen.tokens), len(prompt))]
        self.plugin.start(request, before, tenant_of(params))

    def _finish(self, request: str) -> None:
        if self._requests.pop(request, None) is not None and self.plugin is not None:
            self.plugin.finish(request)

    def close(self) -> None:
        """Save the drafter's state at shutdown of the worker."""
        if self._saver is not None:
            self._saver.close()
