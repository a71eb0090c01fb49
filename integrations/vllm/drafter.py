"""The proposer that vLLM constructs for ``--speculative-config '{"method": "custom_class", ...}'``.

It stands between vLLM's model runner and a registered `contracts.Drafter`: shows it what every step verified, asks it
for trees, and verifies of each tree the best root-to-leaf path, as far as that pays.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from ...plugins.config import ConfigError
from ...plugins.contracts import Candidates, DraftBudget, DraftRequest
from ...plugins.contracts import Drafter as DrafterPlugin
from ...plugins.drafting.budget import StepCost, allocate
from ...plugins.manager import disabled
from . import attach, patches
from .runner import RunnerBinding, Verified, find_runner
from .state import StateSaver

logger = attach.logger

BREADTH = 4  # nodes grown for each token of the path that is verified


class Drafter:
    """A custom proposer of vLLM; see `vllm.v1.spec_decode.custom_class_proposer`."""

    def __init__(self, vllm_config: Any) -> None:
        drafting = attach.admit(vllm_config).get("drafter")
        self.plugin: DrafterPlugin | None = None
        self.cost = StepCost()
        self.counts = {"steps": 0, "proposals": 0, "proposed_tokens": 0, "seconds": 0.0, "requests": 0}
        self._requests: dict[str, bool] = {}  # live request -> whether it wants drafts
        self._step_ended: float | None = None
        self._last_batch: set[str] = set()
        if drafting is None:  # the kill switch: vLLM keeps its proposer, which proposes nothing
            return
        runner = find_runner()
        if runner is None:
            raise ConfigError("pilotfish.drafter: must be constructed by vLLM's V1 model runner")
        from vllm.distributed import get_tp_group

        if get_tp_group().rank_in_group != 0:  # the scheduler takes drafts from the first rank only
            return
        self._depth = drafting.engine.num_speculative_tokens
        plugin: DrafterPlugin = drafting.cls(drafting.options, drafting.engine)
        self.plugin = plugin
        path = plugin.state_path
        self._saver = None if path is None else StateSaver(plugin, Path(path))
        self._device = drafting.engine.device
        self._binding = RunnerBinding(runner, plugin.candidates)
        self._active = False
        logger.info(
            attach.start_up_table("drafter", drafting, f"proposer, at most {self._depth} drafted tokens a step")
        )

    def load_model(self, target_model: Any) -> None:
        """vLLM has loaded the model: compile our kernels, test vLLM's sampling, start to listen."""
        del target_model
        if self.plugin is None or disabled():
            return
        self._warm_up(self.plugin)
        if self._device == "cpu" and patches.sampling_is_broken():
            patches.EXPAND.apply()
            if patches.sampling_is_broken():
                raise RuntimeError("pilotfish: vLLM's expand_batch_to_tokens fails its self-test, even replaced")
            logger.warning(
                "pilotfish: this vLLM build hands uninitialised temperature, top-p and top-k to drafted tokens "
                "(utils/cpu_triton_utils._expand_kernel_impl writes into a copy); expand_batch_to_tokens was replaced"
            )
        if patches.empty_steps_fail(self._device):
            patches.CONSTRAINTS.apply()
            logger.warning(
                "pilotfish: this vLLM build fails on a step without drafts when a request asks for top-k; "
                "apply_sampling_constraints was wrapped"
            )
        self._binding.attach(self._finish, self.close)

    @staticmethod
    def _warm_up(plugin: DrafterPlugin) -> None:
        """Run every compiled kernel once, so that no request waits for a compiler."""
        name, tokens = "pilotfish-warm-up", np.zeros(4, np.int32)
        nothing = np.full((1, 8), -1, np.int32)  # candidates that no row can learn from
        plugin.start(name, tokens[:1])
        plugin.observe(
            name,
            tokens[:1],
            Candidates(tokens[:2], tokens[:1], np.full(1, -1, np.int32), nothing, np.zeros((1, 8), np.float32)),
        )
        plugin.propose([DraftRequest(name, tokens, 2)], DraftBudget(2, 2))
        plugin.finish(name)

    # ------------------------------------------------------------------------------------------------- every step

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each request of the batch; an empty list where there is none.

        Args:
            sampled_token_ids: Tokens that this step gave each request; none while its prompt is still processed.
            num_tokens_no_spec: [b] length of each text, those tokens included.
            token_ids_cpu: [b, max_model_len] the texts.
            slot_mappings: Not used.
        """
        del slot_mappings
        if self.plugin is None:
            return [[] for _ in sampled_token_ids]
        started = time.perf_counter()
        verified = self._binding.step(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        self._time_step(verified, started)
        for i, request in enumerate(verified):
            if request.request not in self._requests:
                self._start(request.request, i)
            self.plugin.observe(request.request, request.tokens, request.candidates)
        drafts = self._draft(verified)
        if self._saver is not None:
            self._saver.touch()
        self._step_ended = time.perf_counter()
        self.counts["seconds"] += self._step_ended - started + self._binding.seconds
        self._binding.seconds = 0.0
        self.counts["steps"] += 1
        self.counts["requests"] += len(verified)
        return drafts

    def _draft(self, verified: list[Verified]) -> list[list[int]]:
        """Ask for trees, take each one's best path, and of those paths as much as the cost of a step allows."""
        assert self.plugin is not None
        drafts: list[list[int]] = [[] for _ in verified]
        wanting = []
        for i, request in enumerate(verified):
            if len(request.tokens) and self._requests[request.request]:
                room = min(self._binding.room(request.request, i, len(request.text)), self._depth)
                wanting.append((i, DraftRequest(request.request, request.text, room)))
        if not wanting:
            return drafts
        trees = self.plugin.propose([r for _, r in wanting], DraftBudget(BREADTH * self._depth, self._depth))
        paths = [tree.best_path() for tree in trees]
        lengths = allocate([tree.scores[path] for tree, path in zip(trees, paths, strict=True)], self.cost)
        for (i, request), tree, path, length in zip(wanting, trees, paths, lengths, strict=True):
            drafts[i] = tree.tokens[path[: min(length, request.limit)]].tolist()
        total = sum(lengths)
        self.counts["proposals"] += sum(length > 0 for length in lengths)
        self.counts["proposed_tokens"] += total
        if total and not self._active:
            self._active = True
            logger.info("pilotfish: drafter %s is active, its first draft has %d tokens", self.plugin.name, total)
        return drafts

    def _time_step(self, verified: list[Verified], now: float) -> None:
        """Learn the cost of a step from the time since the last one, when both did nothing but decode."""
        rows = sum(len(v.candidates.inputs) for v in verified)
        batch = {v.request for v in verified}
        if self._step_ended is not None and batch <= self._last_batch and self._binding.is_decode_only(rows):
            self.cost.observe(len(verified), rows - len(verified), now - self._step_ended)
        self._last_batch = batch

    # ----------------------------------------------------------------------------------------- the life of things

    def _start(self, request: str, index: int) -> None:
        assert self.plugin is not None
        params = self._binding.sampling_params(request)
        extra = (params.extra_args if params is not None else None) or {}
        wanted = str(extra.get("pilotfish_drafter", "on")).lower() not in {"off", "0", "false"}
        self._requests[request] = wanted
        tenant = extra.get("pilotfish_tenant")
        self.plugin.start(request, self._binding.prompt(index), None if tenant is None else str(tenant))

    def _finish(self, request: str) -> None:
        if self._requests.pop(request, None) is not None and self.plugin is not None:
            self.plugin.finish(request)

    def close(self) -> None:
        """The worker shuts down."""
        if self._saver is not None:
            self._saver.close()
