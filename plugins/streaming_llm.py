"""StreamingLLM: attention sinks and recent tokens (arXiv 2309.17453).

A model attends strongly to its first tokens, whatever they are (attention sinks, section 3.1). So every head keeps the
keys and values of the first tokens and of the latest ones, and evicts all others (section 3.2):

    N tokens so far, budget B = sinks + window
    every head keeps the first ``sinks`` tokens and the last ``window`` tokens

Evicted tokens are lost: decoding takes bounded memory and time, and answers that need the middle of a long context get
worse. The method is a common baseline for KV cache eviction.

Differences from the paper: tokens keep the positions that they have in the text (in the paper, positions are counted
within the cache, which matters beyond the context length that the model was trained for). Tokens are evicted in whole
blocks, so a head keeps up to two blocks more than the budget. By default a prompt is processed with full attention
(``prefill=exact``), as in other KV policies; the paper's stream is ``prefill=streaming``.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from numpy.typing import NDArray

from ..kvcache.head_window import HeadPlan, HeadWindow
from ..kvcache.reference import Float64, attention
from . import compiler_check
from .contracts import Engine, KVPolicy
from .hookspecs import Register, hookimpl


@dataclass(frozen=True)
class StreamingLLMOptions:
    """Options of StreamingLLM.

    Attributes:
        budget: Number of tokens that every head keeps, sinks included.
        sinks: Number of first tokens that are always kept.
        prefill: ``exact`` processes a prompt with full attention and frees its blocks afterwards; ``streaming`` evicts
            tokens during the prompt too.
    """

    budget: int = 512
    sinks: int = 4
    prefill: Literal["exact", "streaming"] = "exact"

    def __post_init__(self) -> None:
        for name, low in (("budget", 2), ("sinks", 0)):
            value = getattr(self, name)
            if not low <= value <= 1 << 24:
                raise ValueError(f"{name}: expected {low} to {1 << 24}, got {value}")
        if self.budget <= self.sinks:
            raise ValueError(f"budget: expected more than the {self.sinks} sinks, got {self.budget}")


class StreamingLLM(KVPolicy):
    """Frees KV blocks: heads keep sinks and recent tokens.

    The policy gives every head the same window.
    """

    name: ClassVar[str] = "streaming_llm"
    Options: ClassVar[type] = StreamingLLMOptions
    frees_blocks: ClassVar[bool] = True

    @classmethod
    def check(cls, options: StreamingLLMOptions, engine: Engine) -> None:
        """Refuse a machine that cannot compile the kernels."""
        del options
        compiler_check.require_compiler(cls.name, engine)

    def __init__(self, options: StreamingLLMOptions, engine: Engine) -> None:
        self.options = options
        self.engine = engine

    def head_plan(self) -> HeadPlan:
        """Return the window of all heads; no head keeps the whole context."""
        o = self.options
        window = HeadWindow(o.sinks, o.budget - o.sinks, 0, compensation=False, exact_prefill=o.prefill == "exact")
        return HeadPlan((frozenset(),) * self.engine.layers, window)

    # ---------------------------------------------------------------------------------- the algorithm, in NumPy

    @staticmethod
    def decode_step(query: NDArray, keys: NDArray, values: NDArray, scale: float, sinks: int, window: int) -> Float64:
        """Compute the attention of one decoded token over sinks and recent tokens (section 3.2).

        Args:
            query: [num_heads, head_size].
            keys: [context, num_kv_heads, head_size], the current token last.
            values: As ``keys``.
            scale: Softmax scale.
            sinks: Number of first tokens that are kept.
            window: Number of last tokens that are kept, the current one included.

        Returns:
            [num_heads, head_size] float64.
        """
        context = len(keys)
        kept = [t for t in range(context) if t < sinks or t >= context - window]
        return attention(query, keys[kept], values[kept], scale)[1]


@hookimpl
def register_kv_policies(register: Register) -> None:
    """Register the policy."""
    register(StreamingLLM)
