"""Cost of device drafters per step: counted for an H100, and for Token Recycling measured on this CPU.

usage: python benchmarks/device_drafting_cost.py

Counted are the bytes that the kernels of ``plugins/drafting/*_triton.py`` read and write, the operations, and the
dependent reads and launches of a step. The step itself is that of a dense model of 8 billion parameters in bfloat16:
its weights are read once, the keys and values of all texts too, and a token takes 16 billion operations. Texts have
4,096 tokens, or as many as fit into the memory beside the weights. RASD searches them and 1,048,576 tokens of earlier
outputs. Measured is the counterpart of Token Recycling on the host, `observe` and `propose` of all requests.
"""

import math
import statistics
import time
from dataclasses import dataclass, fields

import numpy as np
from common import RESULTS

from pilotfish.integrations.bench import record
from pilotfish.integrations.bench.record import Record
from pilotfish.plugins.contracts import ROOT, Candidates, DraftBudget, DraftRequest, Engine
from pilotfish.plugins.drafting.adjacency_triton import BEAMS, MAX_CHAIN_DEPTH, MAX_DEPTH, TILE, TREE_BEAMS
from pilotfish.plugins.drafting.datastore import SUFFIX_DEPTH
from pilotfish.plugins.drafting.datastore_triton import WAYS
from pilotfish.plugins.drafting.history_triton import BLOCK as HISTORY_BLOCK
from pilotfish.plugins.drafting.history_triton import REQUESTS
from pilotfish.plugins.drafting.top_k_triton import BLOCK
from pilotfish.plugins.rasd import RASDOptions
from pilotfish.plugins.token_recycling import TokenRecycling, TokenRecyclingOptions

# Data sheet of the H100 SXM; latencies as published measurements of Hopper have them.
BANDWIDTH, OPERATIONS = 3.35e12, 989e12  # bytes/s; bfloat16 operations/s of the tensor cores
SCALAR_OPERATIONS = 33.5e12  # 32-bit operations/s outside of them
LAUNCH, READ = 2e-6, 0.7e-6  # s: gap between two kernels in a stream, and a read that waits for another
PARAMETERS, VOCABULARY = 8.03e9, 128_256
K, ORDER = TokenRecyclingOptions().k, TokenRecyclingOptions().order
KEY, TOKEN, LOGIT, PRIORITY, RATE = 8, 4, 2, 4, 4  # bytes
ROW = K * (TOKEN + 1)  # a row of the table: tokens and confidences
TEXT = 4096  # tokens of a request
KV_MEMORY, KV_TOKEN = 60e9, 131_072  # bytes for keys and values, and of a token: 32 layers, 8 heads of 128, bfloat16
HASH = 4 * ORDER * ORDER  # operations: a hash takes about four for a token
EXPANDED = (ORDER - 1) * KEY + ROW + K * RATE  # bytes that the search reads for a node
CANDIDATE = TOKEN + RATE + 4  # bytes of a candidate of a tree: token, score, parent
DATASTORE = 100_000_000  # tokens


@dataclass
class Cost:
    """Counts of a step.

    Attributes:
        bytes: Bytes read and written.
        operations: Operations outside of the tensor cores.
        reads: Reads of the longest chain in which each waits for the one before it.
        launches: Number of kernels.
    """

    bytes: float
    operations: float
    reads: int
    launches: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def seconds(self) -> float:
        """Duration: the larger of memory and compute time, and what cannot overlap."""
        busy = max(self.bytes / BANDWIDTH, self.operations / SCALAR_OPERATIONS)
        return busy + self.reads * READ + self.launches * LAUNCH


def learning_cost(requests: int, draft_tokens: int) -> Cost:
    """Return the cost of observing a step: the top-k tokens of all rows, counts, and rows of the table."""
    n = requests * (draft_tokens + 1)
    blocks = VOCABULARY / BLOCK
    top_k = n * (VOCABULARY * LOGIT + 2 * blocks * K * 8)
    context = ORDER * TOKEN
    count = n * (context + (ORDER - 1) * KEY + ROW + 4 * K * RATE)
    claim = n * (context + 2 * ORDER * PRIORITY)
    write = n * (context + K * (8 + RATE) + 2 * ORDER * PRIORITY + ORDER * ROW + (ORDER - 1) * KEY)
    # Two launches select the top-k tokens, one gathers, two learn; each of the last three reads a request, then a text.
    return Cost(top_k + count + claim + write, 2 * K * n * VOCABULARY + HASH * 3 * n, 4 * 3, launches=5)


def chain_cost(requests: int, draft_tokens: int) -> Cost:
    """Return the cost of a beam search for the chains of all requests."""
    nodes = requests * draft_tokens * BEAMS
    # A beam search compares all candidates once for each beam.
    search = nodes * (HASH + BEAMS * K + BEAMS * draft_tokens)
    # Before the first draft token: the request, its length, its text. A draft token needs keys and rows, which are read
    # together; the rates are in the L1 cache.
    return Cost(nodes * EXPANDED, search, 3 + draft_tokens, launches=1)


def tree_cost(requests: int, draft_tokens: int, max_depth: int) -> Cost:
    """Return the cost of the trees of all requests: a beam search collects candidates, and the best become nodes."""
    depth = min(max_depth, draft_tokens)
    nodes = requests * depth * TREE_BEAMS
    size = depth * TREE_BEAMS * K  # candidates of a request
    expand = nodes * (EXPANDED + K * CANDIDATE)
    # A program compares its candidates and their parents with all others.
    select = requests * math.ceil(size / TILE) * size * RATE + requests * draft_tokens * CANDIDATE
    compared = requests * size * size * 2 * 3
    # The search, as of a chain. The selection: a candidate, its parent, all others, and the last token of the text.
    return Cost(expand + select, nodes * (HASH + TREE_BEAMS * K) + compared, 3 + depth + 4, launches=2)


def retrieval_cost(requests: int, draft_tokens: int) -> Cost:
    """Return the cost that RASD adds to Token Recycling's: the searches, and the counts.

    Its fusion reads the same rows as Token Recycling's search for a chain, and takes its place.
    """
    options, sources = RASDOptions(), 2
    reads_of_outputs = math.ceil(requests / REQUESTS)  # a program reads a block for several requests
    tokens = requests * text_tokens(requests) + reads_of_outputs * options.outputs
    scan = tokens * TOKEN  # the tokens before and after a position are in the same cache lines
    again = requests * sources * HISTORY_BLOCK * TOKEN  # a block with the longest match
    continuations = requests * sources * options.max_occurrences * draft_tokens * TOKEN
    fuse = continuations + requests * draft_tokens * (sources + 1) * 6 * RATE
    count = requests * draft_tokens * (sources + 1) * 6 * RATE
    votes = requests * draft_tokens * sources * options.max_occurrences**2 * 3
    compared = requests * (text_tokens(requests) + options.outputs) * 6
    # The counts: the request, its text, the predictions. A search: the request, its text, a token; and again for what
    # follows. The fusion: lengths, then continuations.
    return Cost(scan + again + 2 * continuations + fuse + count, votes + compared, 3 + 3 + 4 + 2, launches=3)


def datastore_cost(requests: int, draft_tokens: int) -> Cost:
    """Return the cost that a datastore adds to RASD's: a search in its suffix array, and the continuations."""
    options = RASDOptions()
    lengths = SUFFIX_DEPTH - options.min_match + 1
    levels = math.ceil(math.log(DATASTORE, WAYS + 1))
    compared = requests * lengths * levels * 2 * WAYS  # suffixes: a first one and a last one are searched for
    continuations = requests * options.max_occurrences * draft_tokens * TOKEN
    # The request and its text; at each level an entry of the suffix array, then its tokens; then the continuations.
    reads = 3 + levels * 2 + 2
    return Cost(
        compared * (TOKEN + SUFFIX_DEPTH * TOKEN) + 2 * continuations, compared * SUFFIX_DEPTH * 4, reads, launches=1
    )


def text_tokens(requests: int) -> float:
    """Return the number of tokens of each text."""
    return min(TEXT, KV_MEMORY / KV_TOKEN / requests)


def step_seconds(requests: int, draft_tokens: int) -> float:
    """Return the duration of the model's step that verifies the draft tokens."""
    weights = max(PARAMETERS * 2 / BANDWIDTH, requests * (draft_tokens + 1) * PARAMETERS * 2 / OPERATIONS)
    return weights + requests * text_tokens(requests) * KV_TOKEN / BANDWIDTH


def host_seconds(requests: int, draft_tokens: int, repeats: int = 30) -> list[float]:
    """Measure a step of Token Recycling on the host: a request's text is random, and half of its draft is accepted."""
    rng = np.random.default_rng(0)
    engine = Engine("cost", VOCABULARY, 4096, requests, draft_tokens)
    drafter = TokenRecycling(TokenRecyclingOptions(), engine)
    text = rng.integers(0, 1000, 512).astype(np.int32)
    accepted = draft_tokens // 2 + 1
    asked = [DraftRequest(str(i), text, draft_tokens) for i in range(requests)]
    inputs = text[-draft_tokens - 1 :]
    ids = rng.integers(0, 1000, (len(inputs), K)).astype(np.int32)
    probs = np.full((len(inputs), K), 1 / K, np.float32)
    parents = np.arange(ROOT, draft_tokens, dtype=np.int32)
    candidates = Candidates(text[: -draft_tokens - 1], inputs, parents, ids, probs)
    for request in asked:
        drafter.start(request.id, text)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for request in asked:
            drafter.observe(request.id, inputs[1 : accepted + 1], candidates)
        drafter.propose(asked, DraftBudget(4 * draft_tokens, draft_tokens))
        seconds.append(time.perf_counter() - started)
    return seconds[5:]  # without compilation


def counted(requests: int, draft_tokens: int, verification: str) -> dict[str, Cost]:
    """Return the cost of a step by drafter."""
    learning = learning_cost(requests, draft_tokens)
    trees = verification == "tree"
    length = min(draft_tokens, MAX_CHAIN_DEPTH) if trees else draft_tokens  # of RASD's chain
    chain = chain_cost(requests, length)
    rasd = learning + chain + retrieval_cost(requests, length)
    if trees:
        rasd += tree_cost(requests, draft_tokens, MAX_CHAIN_DEPTH)
    return {
        "token_recycling": learning + (tree_cost(requests, draft_tokens, MAX_DEPTH) if trees else chain),
        "rasd": rasd,
        "rasd@datastore": rasd + datastore_cost(requests, length),
    }


# Trees have the number of nodes that `pilotfish serve` starts with at each batch size, and none above 64 requests.
STEPS = (
    *(("chain", draft_tokens, batch) for draft_tokens in (4, 12) for batch in (1, 8, 64, 256)),
    *(("tree", nodes, batch) for nodes, batch in ((48, 1), (24, 7), (8, 8), (2, 64))),
)


def main() -> None:
    """Count, measure, and write the JSON."""
    records = []
    for verification, draft_tokens, requests in STEPS:
        step = step_seconds(requests, draft_tokens)
        params = {"batch": requests, "num_speculative_tokens": draft_tokens, "verification": verification}
        for arm, cost in counted(requests, draft_tokens, verification).items():
            values = [
                ("bytes", cost.bytes, "bytes", []),
                ("operations", cost.operations, "", []),
                ("counted_us", 1e6 * cost.seconds, "us", []),
                ("step_ms", 1e3 * step, "ms", []),
                ("share", cost.seconds / step, "", []),
            ]
            if arm == "token_recycling" and verification == "chain":
                measured = [1000 * s for s in host_seconds(requests, draft_tokens)]
                values.append(("host_ms", statistics.median(measured), "ms", measured))
            for metric, value, unit, runs in values:
                where = ("device_drafting_cost", f"draft_tokens_{draft_tokens}", arm)
                records.append(Record(*where, metric, round(value, 6), unit, [round(r, 4) for r in runs], params))
    record.write_records(RESULTS / "device_drafting_cost.json", records)


if __name__ == "__main__":
    main()
