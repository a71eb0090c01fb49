"""Prometheus counters of drafters, KV policies and visual pruners, exported by vLLM's metrics endpoint."""

import functools
from typing import Any

import prometheus_client

_LABELS = ("plugin", "engine")


@functools.cache
def _counters() -> dict[str, prometheus_client.Counter]:
    """Return the counters of drafters, created once per process since a name can be registered only once."""
    return {
        "num_drafts": prometheus_client.Counter(
            "pilotfish_drafter_proposals", "Number of drafts of the plugin that reached verification.", _LABELS
        ),
        "num_draft_tokens": prometheus_client.Counter(
            "pilotfish_drafter_drafted_tokens", "Number of draft tokens that the model verified.", _LABELS
        ),
        "num_accepted_tokens": prometheus_client.Counter(
            "pilotfish_drafter_accepted_tokens", "Number of accepted draft tokens.", _LABELS
        ),
    }


class DraftCounters:
    """Wrapper of vLLM's `SpecDecodingProm` that forwards every observation and counts it for the plugin.

    The numbers come from the scheduler, which counts a token once the model has verified it.

    Args:
        plugin: Name of the drafter.
        inner: vLLM's `SpecDecodingProm`.
    """

    def __init__(self, plugin: str, inner: Any) -> None:
        self.plugin, self._inner = plugin, inner
        for counter in _counters().values():
            counter.labels(plugin, "0")  # exported as 0 before the first draft

    def observe(self, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        """Record the statistics of one scheduler step."""
        self._inner.observe(spec_decoding_stats, engine_idx)
        for field, counter in _counters().items():
            counter.labels(self.plugin, str(engine_idx)).inc(getattr(spec_decoding_stats, field))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


FREED_BLOCKS_KEY = "pilotfish_freed_blocks/"  # prefix of a plugin's name, a key in the scheduler's statistics


@functools.cache
def _freed_counter() -> prometheus_client.Counter:
    return prometheus_client.Counter(
        "pilotfish_kv_freed_blocks", "Number of KV blocks freed while their requests were running.", _LABELS
    )


def register_freed_blocks(plugin: str) -> None:
    """Create the counter of a KV policy, so that it is exported as 0 before the first block is freed."""
    _freed_counter().labels(plugin, "0")


def record_freed_blocks(scheduler_stats: Any, engine_idx: int) -> None:
    """Remove the freed blocks from the statistics of a scheduler step and count them.

    `attention.windowed.kv_cache_spec.report_freed` puts them there.
    """
    stats = scheduler_stats.num_kv_fetch_reqs_by_stage
    for key in [key for key in stats if key.startswith(FREED_BLOCKS_KEY)]:
        _freed_counter().labels(key.removeprefix(FREED_BLOCKS_KEY), str(engine_idx)).inc(stats.pop(key))


@functools.cache
def _visual_counters() -> tuple[prometheus_client.Counter, prometheus_client.Counter]:
    return (
        prometheus_client.Counter(
            "pilotfish_pruner_visual_tokens", "Number of visual tokens before pruning.", ("plugin",)
        ),
        prometheus_client.Counter("pilotfish_pruner_dropped_tokens", "Number of pruned visual tokens.", ("plugin",)),
    )


def count_visual_tokens(plugin: str, full: int, kept: int) -> None:
    """Count the visual tokens of a request, in the front-end process, which computes the placeholder tokens.

    Args:
        plugin: Name of the pruner.
        full: Number of visual tokens before pruning.
        kept: Number of visual tokens after pruning.
    """
    total, dropped = _visual_counters()
    total.labels(plugin).inc(full)
    dropped.labels(plugin).inc(full - kept)
