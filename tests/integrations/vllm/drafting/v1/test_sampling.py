"""Sampling along drafts equals sampling token by token with vLLM's sampler, the naive oracle of this file."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from pilotfish.integrations.vllm.drafting.v1 import sampling
from pilotfish.integrations.vllm.drafting.v1.tree_verification import takes_trees
from pilotfish.plugins.contracts import ROOT

VOCABULARY = 12
PROMPT = [1, 2]
STOP = 3


def model_logits(text: list[int]) -> torch.Tensor:
    """Return the logits of a fake model, [vocabulary]: they depend on the whole text."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(tuple(text)) % 2**31)) * 2


class Batch:
    """Requests with outputs so far, and vLLM's objects that describe them."""

    def __init__(self, params: list[SamplingParams]) -> None:
        self.params, self.outputs = params, [[] for _ in params]
        self.generators = {i: torch.Generator().manual_seed(p.seed) for i, p in enumerate(params) if p.seed is not None}

    def metadata(self, index: list[int]) -> SamplingMetadata:
        """Return vLLM's metadata of some of the requests, with their own generators."""
        params = [self.params[i] for i in index]
        greedy = [p.temperature == 0 for p in params]
        penalties = [any((p.presence_penalty, p.frequency_penalty, p.repetition_penalty != 1)) for p in params]
        bad_words = {row: p.bad_words_token_ids for row, p in enumerate(params)}
        allowed = torch.zeros(len(params), VOCABULARY, dtype=torch.bool)
        for row, p in enumerate(params):
            if p.allowed_token_ids:
                allowed[row] = True
                allowed[row, p.allowed_token_ids] = False
        minimum = MinTokensLogitsProcessor(None, torch.device("cpu"), False)  # type: ignore[arg-type]
        added = [(row, self.params[i], PROMPT, self.outputs[i]) for row, i in enumerate(index)]
        minimum.update_state(BatchUpdate(len(index), removed=[], added=added, moved=[]))
        asked = [p.logprobs for p in params if p.logprobs is not None]
        return SamplingMetadata(
            temperature=None if all(greedy) else torch.tensor([p.temperature for p in params]),
            all_greedy=all(greedy),
            all_random=not any(greedy),
            top_p=torch.tensor([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None,
            top_k=torch.tensor([p.top_k or VOCABULARY for p in params]) if any(p.top_k for p in params) else None,
            generators={row: self.generators[i] for row, i in enumerate(index) if i in self.generators},
            max_num_logprobs=max(asked) if asked else None,
            no_penalties=not any(penalties),
            prompt_token_ids=torch.tensor([PROMPT] * len(params)),
            frequency_penalties=torch.tensor([p.frequency_penalty for p in params]),
            presence_penalties=torch.tensor([p.presence_penalty for p in params]),
            repetition_penalties=torch.tensor([p.repetition_penalty for p in params]),
            output_token_ids=[self.outputs[i] for i in index],
            allowed_token_ids_mask=allowed if allowed.any() else None,
            bad_words_token_ids={row: words for row, words in bad_words.items() if words},
            logitsprocs=LogitsProcessors([minimum]),
            spec_token_ids=[[] for _ in index],
        )

    def runner(self, sampler: Sampler) -> Any:
        """Return what the sampling reads of vLLM's model runner."""
        names = [str(i) for i in range(len(self.params))]
        requests = [
            SimpleNamespace(sampling_params=p, output_token_ids=out, prompt_token_ids=PROMPT)
            for p, out in zip(self.params, self.outputs, strict=True)
        ]
        batch = SimpleNamespace(req_ids=names, sampling_metadata=self.metadata(list(range(len(names)))))
        requests = dict(zip(names, requests, strict=True))
        return SimpleNamespace(
            sampler=sampler, input_batch=batch, requests=requests, vllm_config=None, device=torch.device("cpu")
        )


def parameters(**options: Any) -> SamplingParams:
    params = SamplingParams(**options)
    params._all_stop_token_ids = {STOP}
    return params


def with_bad_words(**options: Any) -> SamplingParams:
    params = parameters(**options)
    params._bad_words_token_ids = [[4], [5, 6]]
    return params


KINDS = {
    "greedy": lambda seed: parameters(temperature=0),
    "sampled": lambda seed: parameters(temperature=0.9, seed=seed),
    "top_k": lambda seed: parameters(temperature=0.8, top_k=4, seed=seed),
    "top_p": lambda seed: parameters(temperature=1.2, top_p=0.8, seed=seed),
    "penalties": lambda seed: parameters(presence_penalty=0.8, frequency_penalty=0.4, seed=seed),
    "repetition": lambda seed: parameters(temperature=0, repetition_penalty=1.7),
    "min_tokens": lambda seed: parameters(min_tokens=5, seed=seed),
    "bad_words": lambda seed: with_bad_words(seed=seed),
    "allowed": lambda seed: parameters(allowed_token_ids=[0, 3, 5, 7, 9], seed=seed),
    "logprobs": lambda seed: parameters(logprobs=2, seed=seed),
}


def token_by_token(batch: Batch, sampler: Sampler, index: int, count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Sample ``count`` tokens of one request as decoding without drafts does; returns its log-probabilities too."""
    out, logprobs = batch.outputs[index], []
    for _ in range(count):
        metadata = batch.metadata([index])
        step = sampler(logits=model_logits([*PROMPT, *out])[None], sampling_metadata=metadata)
        out.append(int(step.sampled_token_ids))
        if step.logprobs_tensors is not None:
            logprobs.append(step.logprobs_tensors.logprobs[0])
    return out, logprobs


def a_tree(rng: np.random.Generator, text: list[int]) -> tuple[list[int], list[int]]:
    """Return tokens and parents of a random tree whose tokens are likely continuations."""
    tokens, parents = [], []
    paths: list[list[int]] = []
    for node in range(int(rng.integers(0, 9))):
        parent = int(rng.integers(ROOT, node))
        before = [*text, *(paths[parent] if parent != ROOT else [])]
        token = int(rng.choice(model_logits(before).topk(3).indices.numpy()))
        tokens.append(token)
        parents.append(parent)
        paths.append([*before[len(text) :], token])
    return tokens, parents


@pytest.mark.parametrize("fp64", [False, True], ids=["", "fp64_gumbel"])
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_seeded_requests_get_the_tokens_of_plain_decoding(fp64: bool, kinds: list[str], seed: int) -> None:
    sampler, rng = Sampler(use_fp64_gumbel=fp64), np.random.default_rng(seed)
    batch = Batch([KINDS[kind](seed + i) for i, kind in enumerate(kinds)])
    logprobs: list[list[torch.Tensor]] = [[] for _ in kinds]
    for _ in range(3):
        trees = [a_tree(rng, [*PROMPT, *out]) for out in batch.outputs]
        rows = []
        for out, (tokens, parents) in zip(batch.outputs, trees, strict=True):
            before = [*PROMPT, *out]
            rows.append(model_logits(before))
            for node in range(len(tokens)):
                path, at = [], node
                while at != ROOT:
                    path, at = [tokens[at], *path], parents[at]
                rows.append(model_logits([*before, *path]))
        paths = sampling.draft_paths([t for t, _ in trees], [p for _, p in trees])
        output = sampling.sample_along_drafts(batch.runner(sampler), torch.stack(rows), paths)
        width = output.sampled_token_ids.shape[1]
        for i, row in enumerate(output.sampled_token_ids.tolist()):
            tokens = [t for t in row if t >= 0]
            accepted = [trees[i][0][node] for node in paths[i].nodes]
            assert accepted == tokens[:-1]
            batch.outputs[i] += tokens
            if output.logprobs_tensors is not None:
                logprobs[i] += list(output.logprobs_tensors.logprobs[i * width : i * width + len(tokens)])
    oracle = Batch(batch.params)
    for i, kind in enumerate(kinds):
        tokens, expected = token_by_token(oracle, sampler, i, len(batch.outputs[i]))
        assert batch.outputs[i] == tokens, kind
        if kind == "logprobs":
            torch.testing.assert_close(torch.stack(logprobs[i])[:, :3], torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_any_dtype(dtype: torch.dtype, temperature: float) -> None:
    """Test that logits in the model's dtype give the tokens of the same values in float32."""
    logits = torch.stack([model_logits([7]), model_logits([7, 5])]).to(dtype)
    answers = []
    for values in (logits, logits.float()):
        batch = Batch([parameters(temperature=temperature, seed=3)])
        paths = sampling.draft_paths([[int(logits[0].argmax())]], [[ROOT]])
        answers.append(sampling.sample_along_drafts(batch.runner(Sampler()), values, paths).sampled_token_ids.tolist())
    assert answers[0] == answers[1]


def test_samples_without_a_seed_follow_the_model_distribution() -> None:
    """Test the first two output tokens of 4,000 requests with the same draft."""
    torch.manual_seed(0)
    count, logits = 4000, torch.tensor([[0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 0.5, 0.0]])
    batch = Batch([parameters(temperature=1.0)] * count)
    paths = sampling.draft_paths([[2]] * count, [[ROOT]] * count)
    output = sampling.sample_along_drafts(batch.runner(Sampler()), logits.repeat(count, 1), paths).sampled_token_ids
    first = np.bincount(output[:, 0], minlength=4) / count
    np.testing.assert_allclose(first, torch.softmax(logits[0], -1).numpy(), atol=0.03)
    second = output[output[:, 0] == 2, 1]
    np.testing.assert_allclose(np.bincount(second, minlength=4) / len(second), torch.softmax(logits[1], -1), atol=0.03)


@pytest.mark.parametrize(
    ("params", "trees", "drafts"),
    [
        ({"temperature": 0.7, "top_k": 5, "logprobs": 2, "min_tokens": 3, "repetition_penalty": 1.1}, True, True),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, False, True),
        ({"thinking_token_budget": 20}, True, False),
    ],
    ids=["sampling", "grammar", "thinking budget"],
)
def test_which_requests_take_trees_and_drafts(params: dict[str, Any], trees: bool, drafts: bool) -> None:
    assert takes_trees(SamplingParams(**params)) is trees
    assert sampling.takes_drafts(SamplingParams(**params)) is drafts
