"""What windowed heads keep: sinks and the latest positions, in whole blocks (RazorAttention, arXiv 2407.15891).

Values and arithmetic only, shared by whoever frees blocks and whoever reads them: both see the same window.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadWindow:
    """What a windowed head keeps of a text.

    Attributes:
        sinks: First positions, always kept.
        window: The shortest window of latest positions (S0 of the paper).
        ratio: The window grows to 1/ratio of the text (C of the paper); 0: it does not grow.
        compensation: One more position stands for all that is left out: their mean key and value, with their weight.
        exact_prefill: Nothing is left out while a prompt is processed; else the window moves with every chunk.
    """

    sinks: int
    window: int
    ratio: int
    compensation: bool
    exact_prefill: bool

    def sink_blocks(self, block_size: int) -> int:
        """Blocks that hold the sinks."""
        return -(-self.sinks // block_size)

    def window_length(self, tokens: int) -> int:
        """Positions that the window has at least, ``max(S0, N / C)``."""
        return max(self.window, tokens // self.ratio if self.ratio else 0)

    def first_retained_block(self, tokens: int, block_size: int, in_prompt: bool = False) -> int:
        """The first block behind the sinks that a step reads.

        It never decreases with ``tokens``, so what was freed is not asked for again.

        Args:
            tokens: Processed before the step.
            block_size: Tokens of a block.
            in_prompt: The step processes a prompt.
        """
        sinks = self.sink_blocks(block_size)
        if in_prompt and self.exact_prefill:
            return sinks
        return max(sinks, (tokens - self.window_length(tokens)) // block_size)

    def num_evicted(self, tokens: int, block_size: int, in_prompt: bool = False) -> int:
        """Positions, whole blocks, that a token does not see which has ``tokens`` before it.

        This depends on its position alone, not on how a text was cut into steps.
        """
        return (self.first_retained_block(tokens, block_size, in_prompt) - self.sink_blocks(block_size)) * block_size

    def max_decode_blocks(self, tokens: int, in_flight: int, block_size: int) -> int:
        """The most blocks that a text of up to ``tokens`` holds while ``in_flight`` of them are processed in a step."""
        window = -(-(self.window_length(tokens) + in_flight) // block_size) + 1
        return min(-(-tokens // block_size), self.sink_blocks(block_size) + window)

    def max_blocks(self, tokens: int, in_flight: int, block_size: int) -> int:
        """As `decoding_blocks`, the prompt included."""
        if self.exact_prefill:
            return -(-tokens // block_size)
        return self.max_decode_blocks(tokens, in_flight, block_size)


@dataclass(frozen=True)
class HeadPlan:
    """Which KV heads of a model keep everything; all others are windowed.

    Attributes:
        retrieval_heads: For each layer the KV heads that keep everything.
        window: Of the others.
    """

    retrieval_heads: tuple[frozenset[int], ...]
    window: HeadWindow

    def for_rank(self, rank: int, ranks: int, kv_heads: int) -> "HeadPlan":
        """The part of a tensor-parallel rank, in its own numbers.

        All ranks keep equally many heads whole, as their caches have to be alike: others fill up to the rank that has
        most of them, layer by layer.

        Args:
            rank: Whose.
            ranks: How many there are.
            kv_heads: Of a whole layer; with fewer than ranks, several ranks have the same one.
        """
        each = max(1, kv_heads // ranks)

        def mine(r: int) -> list[set[int]]:
            first = r * kv_heads // ranks
            return [{head - first for head in heads if first <= head < first + each} for heads in self.retrieval_heads]

        whole = mine(rank)
        missing = max(sum(map(len, mine(r))) for r in range(ranks)) - sum(map(len, whole))
        for heads in whole:
            others = sorted(set(range(each)) - heads)[:missing]
            heads.update(others)
            missing -= len(others)
        return HeadPlan(tuple(map(frozenset, whole)), self.window)
