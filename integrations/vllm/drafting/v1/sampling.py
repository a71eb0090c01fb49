"""Verification of draft chains and trees with vLLM's sampler: seeded requests get the tokens of plain decoding.

vLLM's sampler draws a token at the last accepted token of each request. If it is a draft token there, it is accepted,
and sampling continues at its row; else it is the last output token of the step. Hence each output token is a sample of
the target model's distribution given the tokens before it, whatever the draft. vLLM's rejection sampler accepts drafts
with the same probability, but uses other random numbers. Here the sampler takes the same logits, sampling parameters
and random numbers as without drafts: a request with a seed gets the same text with and without speculation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .....plugins.contracts import ROOT
from .tree_verification import TreeVerifier


@dataclass
class DraftPath:
    """Accepted part of one request's draft while a step is sampled.

    Attributes:
        index: Index of the request in the batch.
        first_row: Row of its last accepted token in the logits; row ``first_row + 1 + n`` is the one of draft node n.
        children: Draft node by (parent node, token).
        nodes: Accepted draft nodes from the root down.
        tokens: Output tokens of the step.
        sample_indices: Index of each output token among all tokens sampled in the step.
    """

    index: int
    first_row: int
    children: Mapping[tuple[int, int], int]
    nodes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sample_indices: list[int] = field(default_factory=list)

    @property
    def node(self) -> int:
        """Last accepted draft node; `ROOT` before the first."""
        return self.nodes[-1] if self.nodes else ROOT

    @property
    def row(self) -> int:
        """Row of the last accepted token."""
        return self.first_row + 1 + self.node

    def append(self, token: int, index: int) -> bool:
        """Append an output token; returns whether it is a draft token, after which sampling continues."""
        node = self.children.get((self.node, token))
        self.tokens.append(token)
        self.sample_indices.append(index)
        if node is not None:
            self.nodes.append(node)
        return node is not None


def replace_rejection_sampler(runner: Any, trees: TreeVerifier | None) -> None:
    """Replace the runner's ``_sample`` so that vLLM's sampler verifies drafts; steps without drafts are unchanged.

    Args:
        runner: vLLM's model runner.
        trees: Trees of the current step; None if all drafts are chains.
    """
    sample = runner._sample

    def _sample(logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is None or logits is None:
            return sample(logits, spec_decode_metadata)
        counts = spec_decode_metadata.num_draft_tokens
        drafts = [part.tolist() for part in spec_decode_metadata.draft_token_ids.cpu().split(list(counts))]
        parents: list[Sequence[int]] = []
        for i, count in enumerate(counts):
            tree = None if trees is None else trees.tree_of(i)
            parents.append(range(ROOT, count - 1) if tree is None else tree.parents.tolist())
        paths = draft_paths(drafts, parents)
        output = sample_along_drafts(runner, logits, paths)
        if trees is not None:
            trees.move_accepted([path.nodes for path in paths])
        return output

    runner._sample = _sample


def draft_paths(drafts: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> list[DraftPath]:
    """Return the paths of a batch before anything is sampled.

    Args:
        drafts: Draft tokens of each request; none for a request without a draft.
        parents: Parent of each draft token.
    """
    paths, row = [], 0
    for index, (tokens, above) in enumerate(zip(drafts, parents, strict=True)):
        children: dict[tuple[int, int], int] = {}
        for node, key in enumerate(zip(above, tokens, strict=True)):
            children.setdefault(key, node)
        paths.append(DraftPath(index, row, children))
        row += 1 + len(tokens)
    return paths


def sample_along_drafts(runner: Any, logits: torch.Tensor, paths: list[DraftPath]) -> Any:
    """Sample the output tokens of a step, and record the accepted draft nodes in ``paths``.

    Args:
        runner: vLLM's model runner.
        logits: [rows, vocabulary] logits of the query tokens: for each request its last accepted token and its draft
            tokens. For structured outputs, the grammar's mask has been applied to them.
        paths: The paths of the batch, in batch order; see `draft_paths`.

    Returns:
        vLLM's `SamplerOutput`: [batch, most draft tokens + 1] token ids, padded with -1, and their log-probabilities if
        a request asks for them; if one sets ``logprob_token_ids``, those of the first position only.
    """
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    sampling = runner.input_batch.sampling_metadata
    width = 1 + max(len(path.children) for path in paths)
    active, num_sampled, logprobs = paths, 0, []
    if sampling.all_greedy and _argmax_suffices(sampling):  # one call for all rows instead of one per depth
        greedy = runner.sampler.greedy_sample(logits.float()).tolist()  # vLLM's CPU kernel takes float32
        for path in paths:
            while path.append(greedy[path.row], 0):
                pass
        active = []
    while active:
        rows = torch.tensor([path.row for path in active], device=logits.device)
        metadata = sampling if active is paths else _metadata_of(active, sampling, runner)
        output = runner.sampler(logits=logits[rows], sampling_metadata=metadata)
        # With logprob_token_ids the number of columns depends on the requests: later depths cannot be concatenated.
        if output.logprobs_tensors is not None and (active is paths or not sampling.logprob_token_ids):
            logprobs.append(output.logprobs_tensors)
        drawn = output.sampled_token_ids.flatten().tolist()
        active, num_sampled = (
            [path for i, path in enumerate(active) if path.append(drawn[i], num_sampled + i)],
            num_sampled + len(active),
        )

    def padded(rows: list[list[int]], value: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=dtype, device=logits.device)

    tokens = padded([path.tokens for path in paths], -1, torch.int32)
    if not logprobs:
        return SamplerOutput(tokens, None)
    order = padded([path.sample_indices for path in paths], 0, torch.int64)
    order = order.flatten().clamp(max=sum(len(part.logprobs) for part in logprobs) - 1)
    tensors = [torch.cat(parts)[order] for parts in list(zip(*logprobs, strict=True))[:3]]
    return SamplerOutput(tokens, LogprobsTensors(*tensors))


def _argmax_suffices(sampling: Any) -> bool:
    """Return whether the argmax of the logits is the output: no penalties, masks, logits processors or logprobs."""
    return (
        sampling.no_penalties
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and not any(getattr(p, "min_toks", True) for p in sampling.logitsprocs.non_argmax_invariant)
        and sampling.thinking_budget_state_holder is None
    )


def _metadata_of(active: list[DraftPath], sampling: Any, runner: Any) -> Any:
    """Return vLLM's `SamplingMetadata` of some requests of a batch, each with its output tokens of this step."""
    index = [path.index for path in active]

    def rows(values: Any) -> Any:
        return None if values is None else values[torch.tensor(index, device=values.device)]

    def keys(values: Any) -> Any:
        return None if values is None else {row: values[i] for row, i in enumerate(index) if i in values}

    outputs = sampling.output_token_ids
    return replace(
        sampling,
        temperature=rows(sampling.temperature),
        top_p=rows(sampling.top_p),
        top_k=rows(sampling.top_k),
        generators=keys(sampling.generators),
        prompt_token_ids=rows(sampling.prompt_token_ids),
        frequency_penalties=rows(sampling.frequency_penalties),
        presence_penalties=rows(sampling.presence_penalties),
        repetition_penalties=rows(sampling.repetition_penalties),
        output_token_ids=[[*outputs[path.index], *path.tokens] for path in active] if outputs else [],
        allowed_token_ids_mask=rows(sampling.allowed_token_ids_mask),
        bad_words_token_ids=keys(sampling.bad_words_token_ids),
        logprob_token_ids=keys(sampling.logprob_token_ids),
        logitsprocs=_logits_processors(active, sampling.logitsprocs, runner),
        spec_token_ids=None,
        # Requests with a thinking budget get no drafts, so they have been sampled; see `takes_drafts`.
        thinking_budget_state_holder=None,
    )


def _logits_processors(active: list[DraftPath], processors: Any, runner: Any) -> Any:
    """Return vLLM's logits processors with the state of some requests of a batch."""
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors

    if not any(getattr(p, "min_toks", True) for p in processors.all):  # vLLM allows no other one with speculation
        return LogitsProcessors()
    added = []
    for row, path in enumerate(active):
        request = runner.requests[runner.input_batch.req_ids[path.index]]
        outputs = [*request.output_token_ids, *path.tokens]
        added.append((row, request.sampling_params, request.prompt_token_ids, outputs))
    fresh = [type(p)(runner.vllm_config, runner.device, False) for p in processors.all]
    for processor in fresh:
        processor.update_state(BatchUpdate(len(active), removed=[], added=added, moved=[]))
    return LogitsProcessors(fresh)


def takes_drafts(params: Any) -> bool:
    """Return whether a request can be verified beyond its next token.

    vLLM updates its count of a thinking budget once a step, so a request with one takes no drafts.
    """
    return params is None or getattr(params, "thinking_token_budget", None) is None
