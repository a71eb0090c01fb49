#!/usr/bin/env python3
"""Drafters replayed over recorded greedy outputs: tokens per step of each drafter, and bounds of what could be gained.

usage: python benchmarks/drafter_replay.py NAME=TRACE.jsonl.gz,STEP_TIMES.json,STEP_MS...

TRACE is a recording of `drafter_trace.py`.

Verification is lossless, so the output of a request does not depend on the drafter. A replay asks a drafter for the
draft of every step, and accepts the tokens with which the recorded output continues. It takes seconds where an engine
takes a quarter of an hour, and can replay drafters that know what will be accepted.

A step costs what the engine measured for its number of query tokens (STEP_TIMES is the file that the
engine's log names), plus the rest of a real step: STEP_MS is the duration of a decode step of vLLM without
speculation. Not in a replay: the candidates at rejected positions, from which Token Recycling learns a little more, and
the time that a drafter takes.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from drafter_trace import CANDIDATES, RecordedRequest, read_trace

from pilotfish.integrations.bench.record import Record, write_records
from pilotfish.plugins.contracts import ROOT, Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Engine
from pilotfish.plugins.drafting.draft_length import (
    AcceptanceRecord,
    StepCostModel,
    allocate_draft_tokens,
    smooth_step_times,
)
from pilotfish.plugins.drafting.tree import sort_by_score, truncate_tree
from pilotfish.plugins.rasd import RASD, RASDOptions
from pilotfish.plugins.token_recycling import TokenRecycling, TokenRecyclingOptions

OUT = Path("benchmarks/results/drafter_trace.json")
GROUP = 8  # number of prompts whose acceptance lengths show what a small sample would
NODES = 64  # of the trees in which a bound looks for the accepted path


@dataclass
class Steps:
    """Totals over verification steps."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, drafted: int, seconds: float) -> None:
        self.tokens += tokens
        self.steps += 1
        self.drafted += drafted
        self.seconds += seconds


@dataclass(frozen=True)
class StepTimes:
    """Duration of a step by its number of query tokens."""

    sizes: Sequence[int]
    seconds: np.ndarray

    def __call__(self, rows: int) -> float:
        beyond = max(0, rows - self.sizes[-1]) * np.diff(self.seconds[-2:])[0] / np.diff(self.sizes[-2:])[0]
        return float(np.interp(rows, self.sizes, self.seconds) + beyond)


class Replay(Protocol):
    """A drafter that is replayed; it keeps what it learned from one request for the next."""

    def run(self, name: str, request: RecordedRequest, cost: StepTimes) -> Steps: ...


class SuffixReplay:
    """vLLM's suffix decoding, by the same calls as `vllm.v1.spec_decode.suffix_decoding`."""

    def __init__(self, depth: int, tokens: int, factor: float) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(max_tree_depth=depth, max_cached_requests=10_000)
        self.depth, self.limits = depth, {"max_spec_tokens": tokens, "max_spec_factor": factor, "min_token_prob": 0.1}

    def run(self, name: str, request: RecordedRequest, cost: StepTimes) -> Steps:
        text, at, result = request.text, request.prompt + 1, Steps()
        self.cache.start_request(name, text[: request.prompt])
        self.cache.add_active_response(name, text[request.prompt : at].tolist())
        while at < len(text):
            draft = self.cache.speculate(name, text[max(0, at - self.depth) : at], **self.limits).token_ids
            end = at + min(count_accepted(draft, text[at:]) + 1, len(text) - at)
            result.add(end - at, len(draft), cost(1 + len(draft)))
            self.cache.add_active_response(name, text[at:end].tolist())
            at = end
        self.cache.stop_request(name)
        return result


@dataclass
class DrafterReplay:
    """A Pilotfish drafter, with the draft lengths that the engine would choose.

    Attributes:
        drafter: The drafter.
        depth: Largest length of a path.
        nodes: Number of nodes of a tree; None for chains.
        bound: ``stop`` verifies the accepted part of the best path only; ``tree`` the accepted path of the whole tree.
    """

    drafter: Drafter
    depth: int
    nodes: int | None = None
    bound: str = ""
    cost: StepCostModel = field(default_factory=StepCostModel)

    def run(self, name: str, request: RecordedRequest, cost: StepTimes) -> Steps:
        if not self.cost.steps:
            self.cost.set_latency_profile(cost.sizes, cost.seconds.tolist())
        text, at, result, record = request.text, request.prompt + 1, Steps(), AcceptanceRecord()
        self.drafter.start(name, text[: request.prompt])
        self._observe(name, request, at - 1, at, _EMPTY, [])
        while at < len(text):
            tree = self._draft(name, request, at, record)
            accepted = accepted_path(tree, text[at:])
            end = at + min(len(accepted) + 1, len(text) - at)
            seconds = cost(1 + len(tree))
            result.add(end - at, len(tree), seconds)
            self.cost.observe(1, len(tree), seconds)
            record.observe(tree.scores, end - at - 1)
            self._observe(name, request, at, end, tree, accepted)
            at = end
        self.drafter.finish(name)
        return result

    def _draft(self, name: str, request: RecordedRequest, at: int, record: AcceptanceRecord) -> DraftTree:
        text, most = request.text, min(self.nodes or self.depth, max(request.end - at - 1, 0))
        room = NODES if self.bound == "tree" else most if self.nodes else 4 * self.depth
        tree = self.drafter.propose([DraftRequest(name, text[:at], most)], DraftBudget(room, self.depth))[0]
        if self.bound == "tree":
            return chain_of(tree, np.array(accepted_path(tree, text[at:]), np.int32))
        if self.nodes is None:
            path = tree.best_path()
            tree = chain_of(tree, path[: count_accepted(tree.tokens[path], text[at:])] if self.bound else path)
        tree = truncate_tree(sort_by_score(tree), most)
        if self.bound:
            return tree
        return truncate_tree(tree, allocate_draft_tokens([record.factor * tree.scores], self.cost)[0])

    def _observe(self, name: str, r: RecordedRequest, at: int, end: int, tree: DraftTree, accepted: list[int]) -> None:
        """Pass the tokens from ``at`` to ``end`` to the drafter, with the recorded candidates of accepted positions."""
        ids, probs = np.full((len(tree) + 1, CANDIDATES), -1, np.int32), np.zeros((len(tree) + 1, CANDIDATES), "f4")
        for position, row in enumerate([0, *(node + 1 for node in accepted)], at - r.prompt):
            if position < len(r.ids):
                ids[row], probs[row] = r.ids[position], r.probs[position]
        inputs = np.append(r.text[at - 1 : at], tree.tokens).astype(np.int32)
        parents = np.append([ROOT], tree.parents + 1).astype(np.int32)
        self.drafter.observe(name, r.text[at:end], Candidates(r.text[: at - 1], inputs, parents, ids, probs))


_EMPTY = DraftTree(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def count_accepted(draft: Sequence[int] | np.ndarray, text: np.ndarray) -> int:
    """Return the number of leading tokens of a draft with which the text continues."""
    n = min(len(draft), len(text))
    wrong = np.flatnonzero(np.asarray(draft[:n]) != text[:n])
    return int(wrong[0]) if len(wrong) else n


def accepted_path(tree: DraftTree, text: np.ndarray) -> list[int]:
    """Return the nodes of the path with which the text continues."""
    path: list[int] = []
    for token in text:
        below = np.flatnonzero((tree.parents == (path[-1] if path else ROOT)) & (tree.tokens == token))
        if not len(below):
            break
        path.append(int(below[0]))
    return path


def chain_of(tree: DraftTree, path: np.ndarray) -> DraftTree:
    """Return a path of a tree as a tree."""
    return DraftTree(tree.tokens[path], np.arange(ROOT, len(path) - 1, dtype=np.int32), tree.scores[path])


def replays(engine: Engine) -> dict[str, Callable[[], Replay]]:
    """Return the drafters and the bounds, by name."""

    def rasd(**options: Any) -> RASD:
        return RASD(RASDOptions(**options), engine)

    def token_recycling() -> TokenRecycling:
        return TokenRecycling(TokenRecyclingOptions(), engine)

    depth = RASD.default_depth
    return {
        "suffix": lambda: SuffixReplay(24, 32, 1.0),
        "suffix@depth=64": lambda: SuffixReplay(64, 64, 4.0),
        "token_recycling": lambda: DrafterReplay(token_recycling(), TokenRecycling.default_depth),
        "rasd": lambda: DrafterReplay(rasd(), depth),
        "rasd@verification=tree": lambda: DrafterReplay(rasd(), depth, RASD.default_nodes),
        "rasd@base=none, bound=stop": lambda: DrafterReplay(rasd(base="none"), depth, bound="stop"),
        "rasd, bound=stop": lambda: DrafterReplay(rasd(), depth, bound="stop"),
        "rasd, bound=tree": lambda: DrafterReplay(rasd(), depth, bound="tree"),
    }


def acceptance_length(requests: Sequence[Steps]) -> float:
    """Return the number of tokens per verification step."""
    return sum(s.tokens for s in requests) / sum(s.steps for s in requests)


def replay(model: str, trace: list[RecordedRequest], cost: StepTimes, vocab_size: int) -> list[Record]:
    """Replay all drafters over all requests, twice, and return the metrics."""
    engine: Any = argparse.Namespace(model=model, vocab_size=vocab_size)
    records = []
    for arm, make in replays(engine).items():
        drafter = make()
        for ending in ("", "_again"):
            by_dataset: dict[str, list[Steps]] = defaultdict(list)
            for number, request in enumerate(trace):
                by_dataset[request.dataset].append(drafter.run(f"{number}{ending}", request, cost))
            for dataset, each in by_dataset.items():
                speedups = [round(cost(1) * s.tokens / s.seconds, 4) for s in each if s.steps]
                lengths = [round(acceptance_length(each[i : i + GROUP]), 4) for i in range(0, len(each), GROUP)]
                drafted = sum(s.drafted for s in each) / sum(s.steps for s in each)
                metrics = {
                    "decode_speedup": (statistics.geometric_mean(speedups), "x", speedups),
                    "acceptance_length": (acceptance_length(each), "tokens", lengths),
                    "drafted_per_step": (drafted, "tokens", []),
                }
                params, place = {"model": model, "requests": len(each)}, f"{dataset}{ending}, {model}"
                records += [
                    Record("drafter_trace", place, arm, metric, round(value, 4), unit, runs, params)
                    for metric, (value, unit, runs) in metrics.items()
                ]
    return records


def main() -> None:
    """Replay all drafters over the recordings named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("traces", nargs="+", metavar="NAME=TRACE,STEP_TIMES,STEP_MS")
    args = parser.parse_args()
    records, raw = [], {}
    for trace in args.traces:
        name, _, files = trace.partition("=")
        path, times, step_ms = files.split(",")
        requests = read_trace(Path(path))
        measured = {int(n): t for n, t in json.loads(Path(times).read_text())["times"].items()}
        times = smooth_step_times([measured[n] for n in sorted(measured)])
        cost = StepTimes(sorted(measured), times + (float(step_ms) / 1e3 - times[0]))
        vocab_size = 1 + max(int(max(r.text.max(), r.ids.max())) for r in requests)
        records += replay(name, requests, cost, vocab_size)
        raw[name] = {"step_ms": {n: round(1e3 * cost(n), 2) for n in cost.sizes}}
        write_records(OUT, records, raw)


if __name__ == "__main__":
    main()
