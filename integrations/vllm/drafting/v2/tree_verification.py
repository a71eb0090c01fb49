"""Verification of draft trees in vLLM's V2 model runner, without waiting for the device.

vLLM schedules and stores the nodes of a tree as the tokens of a chain. After the slots in the cache are assigned, nodes
get positions by their depth, and the attention layers their masks. Tokens are sampled at every node (see
`verification`), and the path of sampled tokens is accepted. The keys and values of accepted nodes are then moved to
the slots where a chain would have stored them.
"""

from typing import Any

import numpy as np
import torch

from .....kvcache.kernels.device_tree_triton import AcceptedPaths, DeviceKVMover, DeviceTrees, cache_layout
from ...attention.tree.common import attention_layers, distinct_caches


class DeviceTreeVerifier:
    """Tree verification on one V2 model runner; one instance on every tensor-parallel rank.

    Attributes:
        trees: The draft trees of all requests.
        chain_only: [max_num_reqs] bool whether the draft tokens of a request must form a chain.
        accepted: What the step accepted, a part for each chunk of requests; empty in a step without draft tokens.
    """

    def __init__(self, runner: Any) -> None:
        """Initialise without changing the runner.

        Args:
            runner: vLLM's model runner.
        """
        self._runner = runner
        reqs, device = runner.max_num_reqs, runner.device
        self.trees = DeviceTrees(reqs, runner.num_speculative_steps, runner.max_model_len, device)
        self.chain_only = torch.zeros(reqs, dtype=torch.bool, device=device)
        self.accepted: list[AcceptedPaths] = []
        self._movers: list[tuple[str, DeviceKVMover]] = []  # a layer whose slots are used, and the mover

    def attach(self) -> None:
        """Wrap four methods of the runner on this instance; its class remains unchanged."""
        runner = self._runner
        prepare_attn, prepare_dummy_attn = runner.prepare_attn, runner.prepare_dummy_attn
        initialize_kv_cache, capture_model = runner.initialize_kv_cache, runner.capture_model

        def prepare_attn_and_describe(input_batch: Any) -> Any:
            prepared = prepare_attn(input_batch)
            self.trees.describe(
                input_batch.idx_mapping,
                input_batch.cu_num_logits,
                input_batch.logits_indices,
                input_batch.positions,
                input_batch.num_reqs,
                input_batch.num_reqs_after_padding,
                int(np.diff(input_batch.cu_num_logits_np).max(initial=1)),
            )
            return prepared

        def prepare_dummy_attn_and_clear(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.trees.clear(int(input_batch.num_scheduled_tokens.max(initial=1)))
            return prepare_dummy_attn(input_batch, *args, **kwargs)

        def initialize_kv_cache_and_attach(*args: Any, **kwargs: Any) -> Any:
            initialized = initialize_kv_cache(*args, **kwargs)
            self._movers = []
            for group in (group for groups in runner.attn_groups for group in groups):
                for builder in group.metadata_builders:
                    builder.trees = self.trees
                caches = distinct_caches(attention_layers(runner.vllm_config, group.layer_names))
                self._movers += [(group.layer_names[0], mover) for mover in kv_movers(caches)]
            return initialized

        def clear_and_capture_model(*args: Any, **kwargs: Any) -> Any:
            self.trees.clear(runner.num_speculative_steps + 1)  # of the steps that warmed up the kernels
            return capture_model(*args, **kwargs)

        runner.prepare_attn, runner.prepare_dummy_attn = prepare_attn_and_describe, prepare_dummy_attn_and_clear
        runner.initialize_kv_cache, runner.capture_model = initialize_kv_cache_and_attach, clear_and_capture_model

    # ------------------------------------------------------------------------------------------------- verification

    def accept(
        self, sampled: torch.Tensor, drafted: torch.Tensor, cu_num_logits: torch.Tensor, idx_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accept of each tree the path of sampled tokens; see `verification.replace_verification`."""
        accepted = self.trees.accept(sampled, drafted, cu_num_logits, idx_mapping)
        self.accepted.append(accepted)
        return accepted.tokens, accepted.counts

    def wrap_rejection_sampler(self, rejection_sampler: Any) -> None:
        """Wrap two methods of a rejection sampler of vLLM, which take the rows of a request for a chain."""
        verify_in_chunks, get_logprobs = rejection_sampler._verify_in_chunks, rejection_sampler._get_logprobs_tensors
        prefill_len = rejection_sampler.sampler.req_states.prefill_len.gpu

        def verify_trees_in_chunks(
            logits: torch.Tensor,
            input_batch: Any,
            draft_logits: Any,
            draft_sampled: torch.Tensor,
            pos: torch.Tensor,
            max_chunk_logits: int,
            max_num_logprobs: int,
            verify_draft_sampled: torch.Tensor,
        ) -> Any:
            invalid = verify_draft_sampled != draft_sampled  # by a grammar
            drafted = row_tokens(input_batch, pos, prefill_len)
            drafted_or_invalid = drafted.masked_fill(invalid, -1)
            chunks = max_chunk_logits, max_num_logprobs, drafted_or_invalid
            return verify_in_chunks(logits, input_batch, draft_logits, drafted, pos, *chunks)

        def get_logprobs_of_paths(
            sampled: torch.Tensor, num_sampled: torch.Tensor, logits: torch.Tensor, *args: Any
        ) -> Any:
            if args[-1] >= 0:  # the number of logprobs; negative where no request wants any
                logits = logits[self.accepted[-1].rows]
            return get_logprobs(sampled, num_sampled, logits, *args)

        rejection_sampler._verify_in_chunks = verify_trees_in_chunks
        rejection_sampler._get_logprobs_tensors = get_logprobs_of_paths

    # ------------------------------------------------------------------------------------------ after the verification

    def rows(self, input_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parent of each row of the step and whether it was accepted; see `contracts.DeviceBatch`."""
        if not self.accepted:  # no request has draft tokens
            rows, device = len(input_batch.logits_indices), self.chain_only.device
            parents = torch.full((rows,), -1, dtype=torch.int32, device=device)
            return parents, torch.ones(rows, dtype=torch.bool, device=device)
        parents, accepted = zip(*((part.parents, part.accepted) for part in self.accepted), strict=True)
        return torch.cat(parents), torch.cat(accepted)

    def move_accepted(self, input_batch: Any, slot_mappings: dict[str, torch.Tensor]) -> None:
        """Move the keys and values of the accepted nodes of the step.

        Args:
            input_batch: vLLM's batch of the step.
            slot_mappings: For each layer [tokens] int64 slots of the query tokens.
        """
        if not self.accepted:
            return
        counts, paths = zip(*((part.counts, part.paths) for part in self.accepted), strict=True)
        accepted = torch.cat(counts), torch.cat(paths)
        for layer, mover in self._movers:
            mover(slot_mappings[layer], input_batch.cu_num_logits, input_batch.logits_indices, *accepted)


def kv_movers(caches: list[torch.Tensor]) -> list[DeviceKVMover]:
    """Return movers for the caches of layers, one for each layout of a cache."""
    layouts: dict[Any, list[torch.Tensor]] = {}
    for cache in caches:
        layouts.setdefault(cache_layout(cache), []).append(cache)
    return [DeviceKVMover(group) for group in layouts.values()]


def row_tokens(input_batch: Any, positions: torch.Tensor, prefill_len: torch.Tensor) -> torch.Tensor:
    """Return the token of each row with logits, [n] int32; -1 for the placeholder of a draft token.

    vLLM tells placeholders by the position of a row in a chain. Here that is the position of the root: draft tokens are
    proposed only after a token was sampled.

    Args:
        input_batch: vLLM's batch of the step.
        positions: [n] int64 position of each row.
        prefill_len: [max_num_reqs] number of tokens of each request before the first sampled one.
    """
    local = input_batch.expanded_local_pos
    root = positions[torch.arange(len(positions), device=positions.device) - local]
    placeholder = (local > 0) & (root < prefill_len[input_batch.expanded_idx_mapping])
    return input_batch.input_ids[input_batch.logits_indices].masked_fill(placeholder, -1)


def takes_trees(params: Any, sampler: Any) -> bool:
    """Return whether the draft tokens of a request may form a tree.

    Penalties, bad words, thinking budgets, grammars and third-party logits processors depend on the tokens before a
    row, and take the rows of a request for a chain.

    Args:
        params: Sampling parameters of the request.
        sampler: vLLM's sampler.
    """
    if params is None or params.structured_outputs is not None:
        return False
    if any(not type(processor).__module__.startswith("vllm.") for processor in sampler.logits_processors):
        return False
    return (
        params.repetition_penalty == 1
        and not params.presence_penalty
        and not params.frequency_penalty
        and not params.bad_words
        and getattr(params, "thinking_token_budget", None) is None
    )
