#!/usr/bin/env python3
"""Record greedy outputs of vLLM without speculation, with the most probable tokens at each position.

usage: python benchmarks/drafter_trace.py MODEL TRACE.jsonl.gz PROMPTS... [--sample N,N] [--dtype D]

`drafter_replay.py` replays drafters over the recording.
"""

import argparse
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CANDIDATES = 8


def record(
    model: str, out: Path, files: Sequence[Path], samples: Sequence[int], seed: int, tokens: int, dtype: str
) -> None:
    """Run the prompts of `pilotfish bench drafters` through vLLM without speculation; write one line for each."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from pilotfish.integrations.vllm.bench.drafters import MAX_MODEL_LEN
    from pilotfish.integrations.vllm.bench.prompts import encode_prompt, read_prompts, sample_prompts
    from pilotfish.integrations.vllm.models import registry

    folder = registry.resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = [p for f, n in zip(files, samples, strict=True) for p in sample_prompts(read_prompts(f), n, seed)]
    prompts = [encode_prompt(tokenizer, p, MAX_MODEL_LEN - tokens - 1) for p in drawn]
    engine = LLM(folder, dtype=dtype, max_model_len=MAX_MODEL_LEN, max_num_seqs=16, enforce_eager=True, seed=0)
    answers = engine.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=tokens, logprobs=CANDIDATES),
        use_tqdm=False,
    )
    with gzip.open(out, "wt") as file:
        for prompt, ids, answer in zip(drawn, prompts, answers, strict=True):
            output = answer.outputs[0]
            ranked = [sorted(at.items(), key=lambda c: -c[1].logprob)[:CANDIDATES] for at in output.logprobs or []]
            line = {
                "dataset": prompt.dataset,
                "max_tokens": tokens,
                "prompt": ids,
                "output": list(output.token_ids),
                "ids": [[token for token, _ in at] for at in ranked],
                "logprobs": [[round(c.logprob, 4) for _, c in at] for at in ranked],
            }
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class RecordedRequest:
    """One request and its greedy output.

    Attributes:
        dataset: Name of the prompts' data set.
        prompt: Number of tokens of the prompt.
        end: Number of tokens of the text at the request's ``max_tokens``.
        text: [t] token ids of the prompt and the output.
        ids: [n, k] most probable tokens at each output position, best first.
        probs: [n, k] their probabilities, normalised over the k candidates.
    """

    dataset: str
    prompt: int
    end: int
    text: np.ndarray
    ids: np.ndarray
    probs: np.ndarray


def read_trace(path: Path) -> list[RecordedRequest]:
    """Read the recorded requests."""
    requests = []
    with gzip.open(path, "rt") as file:
        for line in map(json.loads, file):
            probs = np.exp(np.array(line["logprobs"], np.float32))
            probs /= probs.sum(-1, keepdims=True)
            prompt, text = len(line["prompt"]), np.array(line["prompt"] + line["output"], np.int32)
            ids, end = np.array(line["ids"], np.int32), prompt + line["max_tokens"]
            requests.append(RecordedRequest(line["dataset"], prompt, end, text, ids, probs))
    return requests


def main() -> None:
    """Record the prompts named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--sample", default="96,32", help="number of prompts of each file")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    samples = [int(n) for n in args.sample.split(",")]
    record(args.model, args.out, args.prompts, samples, args.seed, args.max_tokens, args.dtype)


if __name__ == "__main__":
    main()
