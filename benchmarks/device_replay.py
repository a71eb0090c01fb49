#!/usr/bin/env python3
"""Acceptance lengths of device drafters and of their counterparts on the host, replayed over recorded greedy outputs.

usage: python benchmarks/device_replay.py NAME=TRACE.jsonl.gz [--requests N] [--dataset NAME]

TRACE is a recording of `drafter_trace.py`. All drafters propose chains of the same fixed length, or trees of the same
number of nodes, and have the same options; vLLM's ``ngram_gpu`` is replayed beside them, at its default setting and at
the best one for these texts. Without a GPU, the device drafters' kernels are interpreted: about a second a step.

As in `drafter_replay.py`, verification is lossless, so the output of a request does not depend on the drafter, and the
candidates at rejected positions are not in a recording; no drafter learns from them.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from drafter_replay import (
    DrafterReplay,
    Steps,
    StepTimes,
    acceptance_length,
    accepted_path,
    chain_of,
    count_accepted,
)
from drafter_trace import CANDIDATES, RecordedRequest, read_trace

from pilotfish.integrations.bench.record import Record, write_records
from pilotfish.plugins.contracts import ROOT, DeviceBatch, DeviceLimits, DraftBudget, DraftRequest, DraftTree, Engine
from pilotfish.plugins.drafting.draft_length import AcceptanceRecord
from pilotfish.plugins.drafting.tree import sort_by_score, truncate_tree
from pilotfish.plugins.rasd import RASD, RASDOptions
from pilotfish.plugins.token_recycling import TokenRecycling, TokenRecyclingOptions

OUT = Path("benchmarks/results/device_replay.json")
OUTPUTS = 1 << 15  # tokens of earlier outputs, more than all recorded ones
LENGTHS = (4, 12)  # draft tokens of a request and step
NODES = (8, 24)  # of a tree
DEPTH = {"token_recycling": 12, "rasd": 24}  # of a tree
NO_COST = StepTimes([1, 2], np.array([1.0, 1.0]))
OPTIONS: dict[str, tuple[type, Any]] = {
    "token_recycling": (TokenRecycling, TokenRecyclingOptions()),
    "rasd": (RASD, RASDOptions(outputs=OUTPUTS)),
}


class FixedLength(DrafterReplay):
    """A drafter on the host whose best chain or tree is verified whole, as on the device."""

    def _draft(self, name: str, request: RecordedRequest, at: int, record: AcceptanceRecord) -> DraftTree:
        most = min(self.nodes or self.depth, max(request.end - at - 1, 0))
        budget = DraftBudget(self.nodes or 4 * self.depth, self.depth)
        tree = self.drafter.propose([DraftRequest(name, request.text[:at], most)], budget)[0]
        return truncate_tree(sort_by_score(tree) if self.nodes else chain_of(tree, tree.best_path()), most)


@dataclass
class NgramReplay:
    """vLLM's ``ngram_gpu``: what followed the last occurrence of the longest suffix of ``low`` to ``high`` tokens."""

    length: int
    low: int
    high: int

    def run(self, name: str, request: RecordedRequest, cost: StepTimes) -> Steps:
        del name
        text, at, result = request.text, request.prompt + 1, Steps()
        while at < len(text):
            draft = self._draft(text[:at])
            end = at + min(count_accepted(draft, text[at:]) + 1, len(text) - at)
            result.add(end - at, self.length, cost(1))
            at = end
        return result

    def _draft(self, text: np.ndarray) -> np.ndarray:
        for n in range(min(self.high, len(text) - 1), self.low - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
            found = np.flatnonzero((windows == text[-n:]).all(1))
            if len(found):
                return text[found[-1] + n :][: self.length]
        return text[:0]


class DeviceReplay:
    """A device drafter with one request at a time, which proposes chains or trees of ``length`` tokens."""

    def __init__(self, name: str, engine: Engine, length: int, max_model_len: int, trees: bool) -> None:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cls, options = OPTIONS[name]
        limits = DeviceLimits(device, 1, length, max_model_len, trees)
        self.drafter = cls.device_drafter(options, engine, limits)  # type: ignore[attr-defined]
        self._torch, self._length, self._trees = torch, length, trees
        self._texts = torch.zeros(1, max_model_len, dtype=torch.int32, device=device)
        self._total = torch.zeros(1, dtype=torch.int32, device=device)
        self._device = device

    def run(self, name: str, request: RecordedRequest, cost: StepTimes) -> Steps:
        del name
        text, at, result = request.text, request.prompt + 1, Steps()
        self._texts[0, : len(text)] = self._tensor(text)
        self.drafter.start(0, self._texts[0, : request.prompt])
        draft = self._step(request, at - 1, at)
        while at < len(text):
            end = at + min(len(accepted_path(draft, text[at:])) + 1, len(text) - at)
            result.add(end - at, self._length, cost(1))
            draft = self._step(request, at, end)
            at = end
        self.drafter.finish(0, self._texts[0], self._total)
        return result

    def _step(self, r: RecordedRequest, at: int, end: int) -> DraftTree:
        """Pass the tokens from ``at`` to ``end`` to the drafter, and return the next draft."""
        rows = [i for i in range(at - r.prompt, end - r.prompt) if i < len(r.ids)]
        positions = np.arange(at - 1, at - 1 + len(rows))
        self._total.fill_(end)
        batch = DeviceBatch(
            num_requests=1,
            max_num_logits=self._length + 1,
            idx_mapping=self._tensor([0], "i8"),
            all_token_ids=self._texts,
            total_len=self._total,
            num_sampled=self._tensor([end - at]),
            cu_num_logits=self._tensor([0, len(rows)]),
            input_ids=self._tensor(r.text[positions]),
            positions=self._tensor(positions, "i8"),
            candidate_ids=self._tensor(r.ids[rows].reshape(-1, CANDIDATES), "i8"),
            candidate_probs=self._tensor(r.probs[rows].reshape(-1, CANDIDATES), "f4"),
            **self._of_trees(len(rows)),
        )
        self.drafter.observe(batch)
        tokens = self.drafter.propose(batch)[0].cpu().numpy().astype(np.int32)
        parents = np.arange(ROOT, len(tokens) - 1, dtype=np.int32)
        if self.drafter.parents is not None:
            parents = self.drafter.parents[0].cpu().numpy()
        return DraftTree(tokens, parents, np.ones(len(tokens), np.float32))

    def _of_trees(self, rows: int) -> dict[str, Any]:
        """Return what a batch has in addition with trees: only accepted positions are recorded, which form a chain."""
        if not self._trees:
            return {}
        accepted, chain_only = np.ones(rows, np.bool_), np.zeros(1, np.bool_)
        return {
            "parents": self._tensor(np.arange(ROOT, rows - 1)),
            "accepted": self._tensor(accepted, "?"),
            "chain_only": self._tensor(chain_only, "?"),
        }

    def _tensor(self, values: Any, dtype: str = "i4") -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(values, dtype)).to(self._device)


def trees(engine: Engine, nodes: int, max_model_len: int) -> dict[str, Callable[[], Any]]:
    """Return the drafters of trees by name."""
    result: dict[str, Callable[[], Any]] = {}
    for name, (cls, options) in OPTIONS.items():
        result[f"{name}, host"] = partial(
            lambda c, o, d: FixedLength(c(o, engine), d, nodes), cls, options, min(DEPTH[name], nodes)
        )
        result[f"{name}, device"] = partial(DeviceReplay, name, engine, nodes, max_model_len, trees=True)
    return result


def chains(engine: Engine, length: int, max_model_len: int) -> dict[str, Callable[[], Any]]:
    """Return the drafters of chains by name."""
    result: dict[str, Callable[[], Any]] = {
        "ngram_gpu": lambda: NgramReplay(length, 5, 5),
        "ngram_gpu@prompt_lookup_min=2": lambda: NgramReplay(length, 2, 5),
        "ngram_gpu@prompt_lookup_min=1": lambda: NgramReplay(length, 1, 5),
    }
    for name, (cls, options) in OPTIONS.items():
        result[f"{name}, host"] = partial(lambda c, o: FixedLength(c(o, engine), length), cls, options)
        result[f"{name}, device"] = partial(DeviceReplay, name, engine, length, max_model_len, trees=False)
    return result


def replay(model: str, trace: list[RecordedRequest], shape: str, length: int) -> list[Record]:
    """Replay drafters that propose chains or trees of ``length`` tokens over all requests, and return the metrics."""
    vocab_size = 1 + max(int(max(r.text.max(), r.ids.max())) for r in trace)
    max_model_len = max(len(r.text) for r in trace) + max(LENGTHS + NODES)
    engine: Any = argparse.Namespace(model=model, vocab_size=vocab_size, max_num_seqs=1)
    records = []
    arms = {"chain": chains, "tree": trees}[shape](engine, length, max_model_len)
    for arm, make in arms.items():
        drafter = make()
        steps = [drafter.run(str(number), request, NO_COST) for number, request in enumerate(trace)]
        each = [round(acceptance_length([s]), 4) for s in steps if s.steps]
        params = {"model": model, "requests": len(trace), "num_speculative_tokens": length}
        place = f"{trace[0].dataset}, {model}, {length} draft tokens"
        if shape == "tree":
            params["verification"], place = "tree", f"{trace[0].dataset}, {model}, trees of {length} nodes"
        value = round(acceptance_length(steps), 4)
        records.append(Record("device_replay", place, arm, "acceptance_length", value, "tokens", each, params))
        sys.stderr.write(f"{place}: {arm}: {value}\n")
    return records


def main() -> None:
    """Replay the drafters over a recording."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", metavar="NAME=TRACE")
    parser.add_argument("--requests", type=int, default=None, help="number of requests; default all")
    parser.add_argument("--dataset", default="spec_bench")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1" if not _has_gpu() else "0")
    name, _, path = args.trace.partition("=")
    requests = [r for r in read_trace(Path(path)) if r.dataset == args.dataset][: args.requests]
    shapes = [("chain", n) for n in LENGTHS] + [("tree", n) for n in NODES]
    with ProcessPoolExecutor(2) as pool:
        records = list(pool.map(partial(replay, name, requests), *zip(*shapes, strict=True)))
    write_records(args.out, [r for each in records for r in each])


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
