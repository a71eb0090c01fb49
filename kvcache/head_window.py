"""The window of non-retrieval heads: sinks and recent tokens, in whole blocks (RazorAttention, arXiv 2407.15891).

The KV cache manager, which frees blocks, and the kernels, which read them, both take the window from here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadWindow:
    """The tokens that a non-retrieval head keeps.

    Attributes:
        sinks: Number of first tokens that are always kept (N0 in the paper).
        window: Smallest number of recent tokens that are kept (S0 in the paper).
        ratio: The window grows to 1/ratio of the context (C in the paper); 0 for a window that does not grow.
        compensation: Whether a compensation token, the mean key and value of the evicted tokens with their weight,
            represents them.
        exact_prefill: Whether prompts are processed with full attention; else the window moves with every chunk.
    """

    sinks: int
    window: int
    ratio: int
    compensation: bool
    exact_prefill: bool

    def sink_blocks(self, block_size: int) -> int:
        """Return the number of blocks that hold the sinks."""
        return -(-self.sinks // block_size)

    def window_length(self, tokens: int) -> int:
        """Return the smallest length of the window after ``tokens`` tokens, ``max(S0, N / C)``."""
        return max(self.window, tokens // self.ratio if self.ratio else 0)

    def first_retained_block(self, tokens: int, block_size: int, in_prompt: bool = False) -> int:
        """Return the index of the first block after the sinks that a step reads.

        The index never decreases with ``tokens``, so a block that was freed is not needed again.

        Args:
            tokens: Number of tokens processed before the step.
            block_size: Number of tokens in a block.
            in_prompt: Whether the token after these ``tokens`` belongs to the prompt.
        """
        sinks = self.sink_blocks(block_size)
        if in_prompt and self.exact_prefill:
            return sinks
        return max(sinks, (tokens - self.window_length(tokens)) // block_size)

    def num_evicted(self, tokens: int, block_size: int, in_prompt: bool = False) -> int:
        """Return how many tokens, in whole blocks, are evicted for a token that has ``tokens`` tokens before it.

        The number depends on the token's position and on whether it is a prompt token, not on how the scheduler split
        the text into steps.
        """
        return (self.first_retained_block(tokens, block_size, in_prompt) - self.sink_blocks(block_size)) * block_size

    def max_decode_blocks(self, tokens: int, in_flight: int, block_size: int) -> int:
        """Return the largest number of blocks that a decoding request holds.

        Args:
            tokens: Largest number of tokens in the request.
            in_flight: Largest number of tokens that one step processes.
            block_size: Number of tokens in a block.
        """
        window = -(-(self.window_length(tokens) + in_flight) // block_size) + 1
        return min(-(-tokens // block_size), self.sink_blocks(block_size) + window)

    def max_blocks(self, tokens: int, in_flight: int, block_size: int) -> int:
        """Return the largest number of blocks that a request holds, its prefill included; see `max_decode_blocks`."""
        if self.exact_prefill:
            return -(-tokens // block_size)
        return self.max_decode_blocks(tokens, in_flight, block_size)


@dataclass(frozen=True)
class HeadPlan:
    """The retrieval heads of a model, which keep every token, and the window of all other heads.

    Attributes:
        retrieval_heads: For each layer, the indices of the KV heads that are retrieval heads.
        window: Window of the non-retrieval heads.
    """

    retrieval_heads: tuple[frozenset[int], ...]
    window: HeadWindow

    def for_rank(self, rank: int, ranks: int, kv_heads: int) -> "HeadPlan":
        """Return the plan of one tensor-parallel rank, with the rank's own head indices.

        The caches of all ranks must have the same layout, so every rank has as many retrieval heads as the rank that
        has most. The other ranks make further heads retrieval heads, layer by layer.

        Args:
            rank: Index of the rank.
            ranks: Number of ranks.
            kv_heads: Number of KV heads of a layer over all ranks; with fewer heads than ranks, several ranks hold the
                same head.
        """
        each = max(1, kv_heads // ranks)

        def heads_of_rank(r: int) -> list[set[int]]:
            first = r * kv_heads // ranks
            return [{head - first for head in heads if first <= head < first + each} for heads in self.retrieval_heads]

        retrieval_heads = heads_of_rank(rank)
        missing = max(sum(map(len, heads_of_rank(r))) for r in range(ranks)) - sum(map(len, retrieval_heads))
        for heads in retrieval_heads:
            others = sorted(set(range(each)) - heads)[:missing]
            heads.update(others)
            missing -= len(others)
        return HeadPlan(tuple(map(frozenset, retrieval_heads)), self.window)
