"""The speculator that takes the place of vLLM's for ``--speculative-config '{"method": "ngram_gpu", ...}'``.

vLLM has no method for third-party speculators. ``ngram_gpu`` is the one that needs no draft model, passes vLLM's checks
for asynchronous scheduling, and keeps the token ids of all requests on the device.
"""

from pathlib import Path
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from .....plugins.contracts import DeviceBatch, DeviceDrafter, DeviceLimits, Unsupported
from .....plugins.drafting.rows_triton import gather_rows
from .....plugins.drafting.top_k_triton import top_k_probs
from ...engine import log
from ...engine.selection import Attachment, attach
from .. import compatibility
from ..request_options import tenant_of
from ..state_saver import StateSaver
from .adapters import map_adapters_to_rows
from .tree_verification import DeviceTreeVerifier, takes_trees
from .verification import accept_chains, replace_verification

logger = log.logger


class PilotfishSpeculator(BaseSpeculator):
    """Speculator of vLLM's V2 model runner that calls a device drafter.

    On the instance of the model runner, `load_model`, `sample`, `add_requests`, `_remove_request` and `shutdown` are
    wrapped, and `compute_logits` of its model while it samples; vLLM's classes remain unchanged.

    Args:
        runner: vLLM's model runner.
        drafting: The attached drafter.
        drafter: The drafter's counterpart on the device.
        trees: Verification of its trees; None if it proposes chains.

    Attributes:
        drafter: The device drafter.
        counts: Totals over all steps.
        running: Indices of the requests that the drafter has started.
    """

    supports_mm_inputs = False
    draft_logits = None  # the draft distribution is one-hot

    def __init__(
        self, runner: Any, drafting: Attachment, drafter: DeviceDrafter, trees: DeviceTreeVerifier | None = None
    ) -> None:
        self.drafter, self._trees = drafter, trees
        self.counts = {"steps": 0, "requests": 0}
        self.running: set[int] = set()
        # vLLM measures step times at start then, and verifies the draft tokens that are worth their time.
        self.enable_adaptive_verification = runner.vllm_config.speculative_config.enable_adaptive_verification
        self._runner, self._requests = runner, runner.req_states
        self._steps: int = runner.num_speculative_steps
        self._waiting: dict[int, tuple[int, str | None]] = {}  # req_idx -> length of the prompt, tenant
        self._candidates: tuple[torch.Tensor, torch.Tensor] | None = None
        self._none = torch.zeros(runner.max_num_reqs, self._steps, dtype=torch.int64, device=runner.device)
        path = drafter.state_path
        self._saver = None if path is None else StateSaver(drafter, Path(path))
        self._wrap_runner()
        if trees is not None:
            trees.attach()
        nbytes = drafter.nbytes + (0 if trees is None else trees.trees.nbytes)
        shape = "chains" if trees is None else "trees"
        how = (
            f"speculator of the V2 runner, {shape} of up to {self._steps} draft tokens per request and step, "
            f"{nbytes / 2**20:,.0f} MiB on the device"
        )
        logger.info("%s", log.start_up_table("drafter", drafting, how))

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Do nothing: the drafter runs outside of CUDA graphs."""

    def capture(self) -> None:
        """Do nothing: the drafter runs outside of CUDA graphs."""

    @property
    def draft_token_confidence_probs(self) -> torch.Tensor:
        """Return the estimated acceptance rate of each draft token after those before it, [requests, K] float32."""
        assert self.drafter.scores is not None  # `attach_speculator` refuses such a drafter
        return conditional_rates(self.drafter.scores)

    # --------------------------------------------------------------------------------------------------- the runner

    def _wrap_runner(self) -> None:
        runner = self._runner
        load_model, sample = runner.load_model, runner.sample
        add_requests, remove, shutdown = runner.add_requests, runner._remove_request, runner.shutdown

        def load_model_and_replace_verification(*args: Any, **kwargs: Any) -> None:
            load_model(*args, **kwargs)
            if runner.rejection_sampler is not None:
                replace_verification(runner.rejection_sampler, self._accept)
                if self._trees is not None:
                    self._trees.wrap_rejection_sampler(runner.rejection_sampler)

        def sample_and_record(hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
            model = runner.model
            compute_logits = model.compute_logits

            def compute_logits_and_record(*args: Any, **kwargs: Any) -> Any:
                logits = compute_logits(*args, **kwargs)
                self._record(logits)  # before a grammar changes them in place
                return logits

            model.compute_logits = compute_logits_and_record
            if self._trees is not None:
                self._trees.accepted.clear()
            try:
                return sample(hidden_states, input_batch, grammar_output)
            finally:
                del model.compute_logits

        def add_requests_and_start(scheduler_output: Any) -> None:
            add_requests(scheduler_output)
            for new in scheduler_output.scheduled_new_reqs:
                req_idx = self._requests.req_id_to_index[new.req_id]
                self._waiting[req_idx] = new.prompt_len, tenant_of(new.sampling_params)
                if self._trees is not None:
                    self._trees.chain_only[req_idx].fill_(not takes_trees(new.sampling_params, runner.sampler))

        def remove_and_finish(request: str) -> bool:
            req_idx = self._requests.req_id_to_index.get(request)
            if req_idx is not None:
                self._waiting.pop(req_idx, None)
            if req_idx in self.running:
                self.running.remove(req_idx)
                text, total_len = self._requests.all_token_ids.gpu[req_idx], self._requests.total_len.gpu
                self.drafter.finish(req_idx, text, total_len[req_idx : req_idx + 1])
            return remove(request)

        def save_and_shutdown(*args: Any, **kwargs: Any) -> Any:
            if self._saver is not None:
                self._saver.close()
            return shutdown(*args, **kwargs)

        runner.load_model, runner.sample = load_model_and_replace_verification, sample_and_record
        runner.add_requests, runner._remove_request = add_requests_and_start, remove_and_finish
        runner.shutdown = save_and_shutdown
        if runner.lora_config is not None:
            map_adapters_to_rows(runner)

    def _accept(
        self, sampled: torch.Tensor, drafted: torch.Tensor, cu_num_logits: torch.Tensor, idx_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._trees is not None:
            return self._trees.accept(sampled, drafted, cu_num_logits, idx_mapping)
        return accept_chains(sampled, drafted, cu_num_logits, self._steps + 1)

    def _record(self, logits: torch.Tensor) -> None:
        """Keep the top-k tokens of all rows; the logits are modified later in the step."""
        self._candidates = top_k_probs(logits, self.drafter.candidates)

    # --------------------------------------------------------------------------------------------------- each step

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Return the draft tokens of each request of the batch, [requests, K] int64."""
        del attn_metadata, last_hidden_states, aux_hidden_states, num_rejected, last_sampled
        del next_prefill_tokens, temperature, seeds, dp_sync_state, skip_attn_for_dummy_run, mm_inputs, is_profile
        if dummy_run or self._candidates is None:
            return self._none[: input_batch.num_reqs]
        all_token_ids = self._requests.all_token_ids.gpu
        row_ids, row_positions = gather_rows(input_batch.input_ids, input_batch.positions, input_batch.logits_indices)
        for req_idx, (prompt_len, tenant) in self._waiting.items():
            self.drafter.start(req_idx, all_token_ids[req_idx, :prompt_len], tenant)
            self.running.add(req_idx)
        self._waiting.clear()
        ids, probs = self._candidates
        self._candidates = None
        of_trees: dict[str, torch.Tensor] = {}
        if self._trees is not None:
            self._trees.move_accepted(input_batch, slot_mappings)
            of_trees["parents"], of_trees["accepted"] = self._trees.rows(input_batch)
            of_trees["chain_only"] = self._trees.chain_only
        batch = DeviceBatch(
            num_requests=input_batch.num_reqs,
            max_num_logits=self._steps + 1,
            idx_mapping=input_batch.idx_mapping,
            all_token_ids=all_token_ids,
            total_len=self._requests.total_len.gpu,
            num_sampled=num_sampled,
            cu_num_logits=input_batch.cu_num_logits,
            input_ids=row_ids,
            positions=row_positions,
            candidate_ids=ids,
            candidate_probs=probs,
            **of_trees,
        )
        self.drafter.observe(batch)
        if self._saver is not None:
            self._saver.touch()
        self.counts["steps"] += 1
        self.counts["requests"] += batch.num_requests
        if num_speculative_tokens == 0 and not self.enable_adaptive_verification:  # none would be verified
            return self._none[: batch.num_requests]
        drafts = self.drafter.propose(batch)
        if self._trees is not None:
            assert self.drafter.parents is not None  # `attach_speculator` refuses such a drafter
            self._trees.trees.parents[batch.idx_mapping] = self.drafter.parents
        return drafts


def conditional_rates(scores: torch.Tensor) -> torch.Tensor:
    """Return the acceptance rate of each token after those before it, from those of whole paths, [requests, K]."""
    before = torch.nn.functional.pad(scores[:, :-1], (1, 0), value=1.0)
    return torch.where(before > 0, scores / before, 0.0)


def attach_speculator(runner: Any) -> None:
    """Replace the speculator of a V2 model runner by ours, if a drafter is selected.

    Args:
        runner: vLLM's model runner, constructed but without a model.

    Raises:
        ConfigError: The selection is invalid.
        Unsupported: The drafter has no counterpart on the device, or the engine cannot serve it.
    """
    config = runner.vllm_config
    drafting = attach("drafter", config)
    if drafting is None or runner.speculator is None:  # only the last pipeline rank samples
        return
    compatibility.check(drafting, config)
    sizes = runner.max_num_reqs, runner.num_speculative_steps, runner.max_model_len
    trees = drafting.config.verification.verification == "tree"
    limits = DeviceLimits(runner.device, *sizes, trees)
    drafter = drafting.cls.device_drafter(drafting.options, drafting.engine, limits)  # type: ignore[attr-defined]
    if drafter is None:
        raise Unsupported(drafting.name, *compatibility.NO_DEVICE_DRAFTER, drafting.engine.model)
    if config.speculative_config.enable_adaptive_verification and drafter.scores is None:
        raise Unsupported(
            drafting.name,
            "it does not estimate acceptance rates, which adaptive verification needs",
            "remove enable_adaptive_verification from --speculative-config",
            drafting.engine.model,
        )
    if trees and drafter.parents is None:
        raise Unsupported(drafting.name, *compatibility.NO_DEVICE_TREES, drafting.engine.model)
    verifier = DeviceTreeVerifier(runner) if trees else None
    runner.speculator = PilotfishSpeculator(runner, drafting, drafter, verifier)
