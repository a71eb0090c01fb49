"""Counters of an engine's plugins and of its prefix cache, from its metrics endpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

PATIENCE = 1.0  # seconds: an answer does not wait for metrics
_LINE = re.compile(
    r"^(pilotfish_\w+?|vllm:kv_cache_usage_perc|vllm:prefix_cache_hits)(?:_total)?\{([^}]*)\} (\S+)$", re.M
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class EngineCounters:
    """The counters of an engine at one point in time.

    Attributes:
        values: Values by name without the prefix, summed over engines: Pilotfish's counters, and vLLM's usage and hits
            of the prefix cache.
        plugins: Names of the plugins that have counters.
    """

    values: Mapping[str, float]
    plugins: tuple[str, ...]

    def since(self, before: "EngineCounters") -> dict[str, int]:
        """Return the increase of each counter since ``before``, by all requests that ran in between."""
        increase = {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}
        return {name: round(n) for name, n in increase.items() if n > 0 and name != "kv_cache_usage_perc"}


async def read_counters(client: httpx.AsyncClient, url: str) -> EngineCounters | None:
    """Read the counters of a vLLM server; None for a server without metrics.

    Args:
        client: HTTP client.
        url: URL of the server's API, which usually ends in ``/v1``.
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
        except ValueError:  # not a number
            continue
        if plugin := dict(_LABEL.findall(labels)).get("plugin"):
            plugins[plugin] = True
    return EngineCounters(values, tuple(plugins))
