"""The proposer that vLLM constructs for ``--speculative-config '{"method": "custom_class", ...}'``.

It stands between vLLM's model runner and a registered `contracts.Drafter`: shows it what every step verified, asks it
for trees, and has of each as much verified as pays: its best root-to-leaf path, or the tree itself (see `trees`).
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
from .. import compatibility, step_times, vllm_fixes
from ..state_saver import StateSaver
from .model_runner import RunnerBinding, Verified, find_runner
from .tree_verification import TreeVerifier

logger = log.logger

NODES_PER_TOKEN = 4  # nodes grown for each token of a path that is verified


@dataclass
class _LiveRequest:
    """A live request."""

    wanted: bool  # whether it wants drafts
    record: AcceptanceRecord = field(default_factory=AcceptanceRecord)
    draft: DraftTree | None = None  # the last
    length: int = -1  # of its text when it was seen last; not yet, if negative

    def record_step(self, verified: Verified) -> None:
        """What came of the last draft, or of as much of it as was verified."""
        self.length = len(verified.text)
        if self.draft is None or not len(verified.tokens):
            return
        draft = truncate_tree(self.draft, len(verified.candidates.inputs) - 1)
        self.draft = None
        same = np.array_equal(draft.tokens, verified.candidates.inputs[1:])
        if same and np.array_equal(draft.parents, verified.candidates.parents[1:] - 1):
            self.record.observe(draft.scores, len(verified.tokens) - 1)

    def missed_steps(self, verified: Verified) -> bool:
        """Whether steps went by that we were not shown, as vLLM does near the end of a draft model's context."""
        return 0 <= self.length != len(verified.text) - len(verified.tokens)


class PilotfishProposer:
    """A custom proposer of vLLM; see `vllm.v1.spec_decode.custom_class_proposer`."""

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
        if drafting is None:  # the kill switch: vLLM keeps its proposer, which proposes nothing
            return
        runner = find_runner()
        if runner is None:
            raise ConfigError("pilotfish.drafter: must be constructed by vLLM's V1 model runner")
        self._runner = runner
        self._verification = drafting.config.verification
        if self._verification.verification == "tree":
            self.trees = TreeVerifier(runner, drafting.name, get_tp_group())
        self._tp = get_tp_group()
        self._device = drafting.engine.device
        if self._tp.rank_in_group != 0:  # the scheduler takes drafts from the first rank only
            return
        self._most = drafting.engine.num_speculative_tokens
        self._depth = self._most if self.trees is None else min(self._most, drafting.cls.default_depth)  # type: ignore[attr-defined]
        plugin: DrafterPlugin = drafting.cls(drafting.options, drafting.engine)
        self.plugin = plugin
        path = plugin.state_path
        self._saver = None if path is None else StateSaver(plugin, Path(path))
        self._binding = RunnerBinding(runner, plugin.candidates)
        self._active = False
        how = f"proposer, at most {self._most} drafted tokens a step, verified as a {self._verification.verification}"
        logger.info(log.start_up_table("drafter", drafting, how))

    def load_model(self, target_model: Any) -> None:
        """vLLM has loaded the model: compile our kernels, test vLLM's sampling, start to listen."""
        del target_model
        if disabled() or self._drafting is None:
            return
        if self.trees is not None:
            self.trees.attach()
        if self._verification.nodes is None:
            engine = self._drafting.engine
            step_times.measure_when_ready(
                self._runner, engine, engine.num_speculative_tokens + 1, self._use_latency_profile
            )
        self._work_around_vllm()  # on every rank: all of them sample
        if self.plugin is None:
            return
        self._warm_up(self._drafting.cls(self._drafting.options, self._drafting.engine))
        self._binding.attach(self._finish, self.close)

    def _work_around_vllm(self) -> None:
        """Replace what vLLM's build gets wrong in sampling drafts, where its self-tests fail."""
        if self._device == "cpu" and vllm_fixes.draft_sampling_is_broken():
            vllm_fixes.EXPAND_BATCH.apply()
            if vllm_fixes.draft_sampling_is_broken():
                raise RuntimeError("pilotfish: vLLM's expand_batch_to_tokens fails its self-test, even replaced")
            logger.warning(
                "pilotfish: this vLLM build hands uninitialised temperature, top-p and top-k to drafted tokens "
                "(utils/cpu_triton_utils._expand_kernel_impl writes into a copy); expand_batch_to_tokens was replaced"
            )
        if vllm_fixes.empty_steps_fail(self._device):
            vllm_fixes.SAMPLING_CONSTRAINTS.apply()
            logger.warning(
                "pilotfish: this vLLM build fails on a step without drafts when a request asks for top-k; "
                "apply_sampling_constraints was wrapped"
            )

    def _use_latency_profile(self, times: step_times.StepTimes) -> None:
        """Step times were measured; one size alone tells nothing."""
        if len(times) > 1:
            self.cost.set_latency_profile(list(times), list(times.values()))

    @staticmethod
    def _warm_up(plugin: DrafterPlugin) -> None:
        """Run every compiled kernel once, on an instance of its own, so that no request waits for a compiler."""
        name, text = "pilotfish-warm-up", np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)  # it repeats: there is a draft
        nothing = np.full((1, 8), -1, np.int32)  # candidates that no row can learn from
        seen = Candidates(text[:-1], text[-1:], np.full(1, -1, np.int32), nothing, np.zeros((1, 8), np.float32))
        plugin.start(name, text)
        for _ in range(2):  # the second time there is a draft to learn from
            plugin.observe(name, text[2:3], seen)
            plugin.propose([DraftRequest(name, text, 2)], DraftBudget(4, 2))
        plugin.finish(name)

    # ------------------------------------------------------------------------------------------------- every step

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
        drafted: list[list[int]] | None = None,
    ) -> list[list[int]]:
        """Drafts for each request of the batch; an empty list where there is none.

        Args:
            sampled_token_ids: Tokens that this step gave each request; none while its prompt is still processed.
            num_tokens_no_spec: [b] length of each text, those tokens included.
            token_ids_cpu: [b, max_model_len] the texts.
            slot_mappings: Not used.
            drafted: What vLLM's draft model proposed for each request, where there is one.
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
        """Ask for trees, and take of each as much as the cost of a step allows."""
        assert self.plugin is not None
        drafts: list[list[int]] = [[] for _ in verified]
        wanting = []
        for i, request in enumerate(verified):
            if len(request.tokens) and self._requests[request.request].wanted:
                room = min(self._binding.free_slots(request.request, i, len(request.text)), self._most)
                proposed = np.array([] if drafted is None else drafted[i], np.int32)
                wanting.append((i, DraftRequest(request.request, request.text, room, proposed)))
        kept: dict[str, DraftTree] = {}
        if wanting:
            nodes = NODES_PER_TOKEN * self._depth if self.trees is None else self._most
            proposed = self.plugin.propose([r for _, r in wanting], DraftBudget(nodes, self._depth))
            trees = [self._verifiable(r, tree) for (_, r), tree in zip(wanting, proposed, strict=True)]
            live = [self._requests[r.id] for _, r in wanting]
            sizes = self._allocate(trees, live)
            for (i, request), tree, size, one in zip(wanting, trees, sizes, live, strict=True):
                kept[request.id] = one.draft = truncate_tree(tree, size)
                drafts[i] = kept[request.id].tokens.tolist()
            total = sum(map(len, drafts))
            self.counts["proposals"] += sum(map(bool, drafts))
            self.counts["proposed_tokens"] += total
            if total and not self._active:
                self._active = True
                logger.info("pilotfish: drafter %s is active, its first draft has %d tokens", self.plugin.name, total)
        if self.trees is not None:
            self.trees.set_drafts(self._tp.broadcast_object(kept))
        return drafts

    def _verifiable(self, request: DraftRequest, tree: DraftTree) -> DraftTree:
        """Of a tree what the request can have verified: all of it, or its best path."""
        if self.trees is None or not self.trees.can_verify_tree(request.id):
            path = tree.best_path()
            tree = DraftTree(tree.tokens[path], np.arange(ROOT, len(path) - 1, dtype=np.int32), tree.scores[path])
        else:
            tree = sort_by_score(tree)
        return truncate_tree(tree, max(request.limit, 0))

    def _allocate(self, trees: list[DraftTree], live: "list[_LiveRequest]") -> list[int]:
        """How many nodes of each request's tree to verify."""
        if self._verification.nodes is not None:
            return [min(len(tree), self._verification.nodes) for tree in trees]
        if self.plugin is not None and self.plugin.fixed_size:
            return [len(tree) for tree in trees]
        return allocate_draft_tokens(
            [one.record.factor * t.scores for t, one in zip(trees, live, strict=True)], self.cost
        )

    def _time_step(self, verified: list[Verified], now: float) -> None:
        """Learn the cost of a step from the time since the last one, when both did nothing but decode."""
        rows = sum(len(v.candidates.inputs) for v in verified)
        batch = {v.request for v in verified}
        if self._step_ended is not None and batch <= self._last_batch and self._binding.is_decode_only(rows):
            self.cost.observe(len(verified), rows - len(verified), now - self._step_ended)
        self._last_batch = batch

    # ----------------------------------------------------------------------------------------- the life of things

    def _start(self, request: str, index: int, seen: Verified) -> None:
        """Tell the plugin of a request; of its text all that stands before what this step brought."""
        assert self.plugin is not None
        params = self._binding.sampling_params(request)
        extra = (params.extra_args if params is not None else None) or {}
        wanted = str(extra.get("pilotfish_drafter", "on")).lower() not in {"off", "0", "false"}
        self._requests[request] = _LiveRequest(wanted)
        tenant = extra.get("pilotfish_tenant")
        prompt = self._binding.prompt(index)
        before = seen.text[: max(len(seen.text) - len(seen.tokens), len(prompt))]
        self.plugin.start(request, before, None if tenant is None else str(tenant))

    def _finish(self, request: str) -> None:
        if self._requests.pop(request, None) is not None and self.plugin is not None:
            self.plugin.finish(request)

    def close(self) -> None:
        """The worker shuts down."""
        if self._saver is not None:
            self._saver.close()
