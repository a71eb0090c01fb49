"""What an engine's plugins did, by its own counters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

PATIENCE = 1.0  # seconds: an answer does not wait for figures
_LINE = re.compile(
    r"^(pilotfish_\w+?|vllm:kv_cache_usage_perc|vllm:prefix_cache_hits)(?:_total)?\{([^}]*)\} (\S+)$", re.M
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class EngineCounters:
    """Of an engine at one moment.

    Attributes:
        values: Ours by name, summed over engines, without ``pilotfish_``; and what vLLM says of its cache.
        plugins: Those that count.
    """

    values: Mapping[str, float]
    plugins: tuple[str, ...]

    def since(self, before: "EngineCounters") -> dict[str, int]:
        """What was counted in between, of all requests that ran meanwhile."""
        grown = {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}
        return {name: round(n) for name, n in grown.items() if n > 0 and name != "kv_cache_usage_perc"}


async def read_counters(client: httpx.AsyncClient, url: str) -> EngineCounters | None:
    """Counters of a vLLM server; None of servers that have none.

    Args:
        client: To ask with.
        url: Of the server's API, which ends in ``/v1`` as a rule.
    """
    try:
        answer = await client.get(f"{url.rstrip('/').removesuffix('/v1')}/metrics", timeout=PATIENCE)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    if answer.status_code != 200:
        return None
    values: dict[str, float] = {}
    plugins = {}
    for name, labels, value in _LINE.findall(answer.text):
        short = name.removeprefix("pilotfish_").removeprefix("vllm:")
        if short.endswith("_created"):
            continue
        try:
            values[short] = values.get(short, 0.0) + float(value)
        except ValueError:  # not as Prometheus has it: nothing to count
            continue
        if plugin := dict(_LABEL.findall(labels)).get("plugin"):
            plugins[plugin] = True
    return EngineCounters(values, tuple(plugins))
