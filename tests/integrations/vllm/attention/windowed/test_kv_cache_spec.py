"""KV blocks of non-retrieval heads in vLLM's cache manager: never freed while read, never leaked, never shared."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from pilotfish.integrations.vllm.attention.windowed import kv_cache_spec
from pilotfish.integrations.vllm.attention.windowed.kv_cache_spec import WindowedHeadSpec, max_concurrency
from pilotfish.integrations.vllm.engine import metrics
from pilotfish.kvcache.head_window import HeadWindow

BLOCK, LONGEST, CHUNK = 32, 2000, 256
SHAPE = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}


def config(window: HeadWindow, blocks: int, groups: int = 2) -> KVCacheConfig:
    """Return a cache configuration with one group of retrieval heads and ``groups`` windowed groups."""
    spec = WindowedHeadSpec(**SHAPE, window=window, longest=LONGEST, in_flight=CHUNK)
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec(["whole"], FullAttentionSpec(**SHAPE)),
            *(KVCacheGroupSpec([f"windowed{i}"], spec) for i in range(groups)),
        ],
    )


@dataclass
class SimulatedScheduler:
    """Simulated scheduler that checks the blocks of its requests."""

    window: HeadWindow
    manager: KVCacheManager
    blocks: int
    running: list[Request] = field(default_factory=list)
    count: int = 0

    def held(self) -> Iterator[int]:
        """Yield the ids of all held blocks, once for each request and group that holds them."""
        for request in self.running:
            for group in self.manager.get_blocks(request.request_id).blocks:
                yield from (b.block_id for b in group if not b.is_null)

    def start(self, length: int) -> None:
        self.count += 1
        request = Request(str(self.count), list(range(length)), SamplingParams(max_tokens=100), None)
        if self.schedule(request, min(CHUNK, length), admit=True):
            self.running.append(request)

    def schedule(self, request: Request, tokens: int, admit: bool = False) -> bool:
        begin = request.num_computed_tokens
        new_blocks = self.manager.allocate_slots(request, tokens, full_sequence_must_fit=admit)
        if new_blocks is None:
            return False
        whole, *windowed = self.manager.get_blocks(request.request_id).blocks
        end = begin + tokens
        assert not any(b.is_null for b in whole[: -(-end // BLOCK)])
        sinks = self.window.sink_blocks(BLOCK)
        first = self.window.first_retained_block(begin, BLOCK, in_prompt=begin < request.num_prompt_tokens)
        for group in windowed:
            for j in (*range(sinks), *range(first, -(-end // BLOCK))):
                if j * BLOCK < end:
                    assert not group[j].is_null, f"block {j} is read in the step from {begin} to {end}"
            kept = sum(not b.is_null for b in group)
            spec = self.manager.coordinator.single_type_managers[1].kv_cache_spec
            assert kept <= spec.max_blocks
            assert kept <= -(-end // BLOCK) - (first - sinks), "evicted blocks are freed"
        request.num_computed_tokens = end
        if end >= request.num_tokens:
            request.append_output_token_ids(1)
        return True

    def step(self, which: int) -> None:
        request = self.running[which % len(self.running)]
        tokens = min(CHUNK, request.num_tokens - request.num_computed_tokens)
        if request.num_computed_tokens + tokens > LONGEST or not self.schedule(request, tokens):
            self.stop(which, preempt=True)

    def stop(self, which: int, preempt: bool) -> None:
        request = self.running.pop(which % len(self.running))
        self.manager.free(request)
        if preempt and request.num_tokens < LONGEST:  # it is recomputed, with its outputs after its prompt
            request.num_computed_tokens = 0
            if self.schedule(request, min(CHUNK, request.num_tokens), admit=True):
                self.running.append(request)

    def check(self) -> None:
        held = list(self.held())
        assert len(held) == len(set(held)), "two requests hold the same block"
        assert self.manager.block_pool.get_num_free_blocks() + len(held) == self.blocks - 1, "a block is leaked"


windows = st.builds(
    HeadWindow,
    sinks=st.integers(0, 70),
    window=st.integers(1, 600),
    ratio=st.sampled_from([0, 2, 5]),
    compensation=st.booleans(),
    exact_prefill=st.booleans(),
)
actions = st.lists(
    st.tuples(st.sampled_from(["start", "step", "step", "step", "abort", "preempt"]), st.integers(1, 1900)),
    min_size=5,
    max_size=60,
)


@settings(max_examples=120, deadline=None)
@given(windows, st.integers(60, 400), actions)
def test_no_block_is_freed_while_read_or_leaked(window: HeadWindow, blocks: int, todo: list) -> None:
    simulated = SimulatedScheduler(
        window, KVCacheManager(config(window, blocks), LONGEST, BLOCK, BLOCK, CHUNK, enable_caching=False), blocks
    )
    for action, number in todo:
        if action == "start":
            simulated.start(number)
        elif simulated.running:
            if action == "step":
                for _ in range(8):
                    if simulated.running:
                        simulated.step(number)
            else:
                simulated.stop(number, preempt=action == "preempt")
        simulated.check()
    while simulated.running:
        simulated.stop(0, preempt=False)
    simulated.check()
    assert simulated.manager.block_pool.get_num_free_blocks() == blocks - 1


def test_freed_blocks_are_counted_and_reported() -> None:
    window = HeadWindow(sinks=4, window=96, ratio=0, compensation=True, exact_prefill=False)
    manager = KVCacheManager(config(window, 400), LONGEST, BLOCK, BLOCK, CHUNK, enable_caching=False)
    scheduler = SimpleNamespace(kv_cache_manager=manager, make_stats=SchedulerStats)
    kv_cache_spec.report_freed(scheduler, "razor_attention")
    counter = metrics._freed_counter().labels("razor_attention", "3")
    simulated = SimulatedScheduler(window, manager, 400)
    simulated.start(1500)
    for _ in range(12):
        simulated.step(0)
        stats, before = scheduler.make_stats(), counter._value.get()
        metrics.record_freed_blocks(stats, 3)
        assert stats.num_kv_fetch_reqs_by_stage == {}, "the count is hidden from vLLM's loggers"
        assert counter._value.get() >= before
    whole, *windowed = manager.get_blocks(simulated.running[0].request_id).blocks
    num_freed = sum(block.is_null for group in windowed for block in group)
    assert counter._value.get() == num_freed > 50
    assert not any(block.is_null for block in whole)
    assert scheduler.make_stats().num_kv_fetch_reqs_by_stage == {}, "nothing new was freed"


class Engine:
    """Fields of the engine configuration that vLLM's cache spec reads."""

    class model_config:  # noqa: N801
        max_model_len = LONGEST

    class parallel_config:  # noqa: N801
        decode_context_parallel_size = 1


def test_max_concurrency_counts_one_request_in_prefill_and_the_others_in_decode() -> None:
    exact = HeadWindow(4, 300, 5, True, exact_prefill=True)
    whole = -(-LONGEST // BLOCK)
    steady = whole + 2 * exact.max_decode_blocks(LONGEST, 1, BLOCK)
    assert max_concurrency(config(exact, 3 * whole + 2 * steady), Engine) == pytest.approx(3)
    assert max_concurrency(config(exact, 3 * whole // 2), Engine) == pytest.approx(0.5, abs=0.01)
    plain = KVCacheConfig(100, [], [KVCacheGroupSpec(["whole"], FullAttentionSpec(**SHAPE))])
    assert max_concurrency(plain, Engine) is None, "without windowed heads, vLLM's figure is used"
