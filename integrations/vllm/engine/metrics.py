"""Counters of drafters, KV policies and visual pruners in vLLM's Prometheus endpoint, beside vLLM's own."""

import functools
from typing import Any

import prometheus_client

_LABELS = ("plugin", "engine")


@functools.cache
def _counters() -> dict[str, prometheus_client.Counter]:
    """Made once in a process, since a name can be registered once."""
    return {
        "num_drafts": prometheus_client.Counter(
            "pilotfish_drafter_proposals", "Drafts proposed by the plugin that reached verification.", _LABELS
        ),
        "num_draft_tokens": prometheus_client.Counter(
            "pilotfish_drafter_drafted_tokens", "Drafted tokens that the model verified.", _LABELS
        ),
        "num_accepted_tokens": prometheus_client.Counter(
            "pilotfish_drafter_accepted_tokens", "Drafted tokens that were accepted.", _LABELS
        ),
    }


class DraftCounters:
    """Stands where vLLM keeps its `SpecDecodingProm`: passes every observation on, and counts it for the plugin.

    The numbers come from the scheduler, which counts a token when the model has verified it.
    """

    def __init__(self, plugin: str, inner: Any) -> None:
        self.plugin, self._inner = plugin, inner
        for counter in _counters().values():
            counter.labels(plugin, "0")  # present, as 0, before the first draft

    def observe(self, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        """Take in the statistics of one scheduler step."""
        self._inner.observe(spec_decoding_stats, engine_idx)
        for field, counter in _counters().items():
            counter.labels(self.plugin, str(engine_idx)).inc(getattr(spec_decoding_stats, field))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


FREED_BLOCKS_KEY = "pilotfish_freed_blocks/"  # and a plugin's name: a key in the statistics of a scheduler


@functools.cache
def _freed_counter() -> prometheus_client.Counter:
    return prometheus_client.Counter(
        "pilotfish_kv_freed_blocks", "KV blocks given back to vLLM's pool while their requests went on.", _LABELS
    )


def register_freed_blocks(plugin: str) -> None:
    """Show the counter of a KV policy before it counts."""
    _freed_counter().labels(plugin, "0")


def record_freed_blocks(scheduler_stats: Any, engine_idx: int) -> None:
    """Take freed blocks out of the statistics of a scheduler step, and count them; see `head_cache.report_freed`."""
    carried = scheduler_stats.num_kv_fetch_reqs_by_stage
    for key in [key for key in carried if key.startswith(FREED_BLOCKS_KEY)]:
        _freed_counter().labels(key.removeprefix(FREED_BLOCKS_KEY), str(engine_idx)).inc(carried.pop(key))


@functools.cache
def _visual_counters() -> tuple[prometheus_client.Counter, prometheus_client.Counter]:
    return (
        prometheus_client.Counter(
            "pilotfish_pruner_visual_tokens", "Visual tokens that pictures and videos would have taken.", ("plugin",)
        ),
        prometheus_client.Counter("pilotfish_pruner_dropped_tokens", "Of these, those that were dropped.", ("plugin",)),
    )


def count_visual_tokens(plugin: str, full: int, kept: int) -> None:
    """Count a request's visual tokens, where they are announced: in the front of the engine."""
    whole, dropped = _visual_counters()
    whole.labels(plugin).inc(full)
    dropped.labels(plugin).inc(full - kept)
