"""The plugins of this project and the inputs of the checks that apply to every plugin.

`tests/plugins/test_default_plugins.py` runs the checks that need no engine, and
`tests/integrations/vllm/test_default_plugins.py` those that need one. A new plugin needs one entry here.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PluginCase:
    """A plugin with options for a small model.

    Attributes:
        kind: Plugin type.
        name: Name of the plugin.
        misspelt: A misspelt option, and the known option that is nearest to it.
        wrong_type: An option with a value of a wrong type; None for a plugin without options.
        options: Options that suit the small test models.
        counters: Prometheus counters that the plugin exports.
    """

    kind: str
    name: str
    misspelt: tuple[str, str]
    wrong_type: tuple[str, Any] | None
    options: dict[str, Any] = field(default_factory=dict)
    counters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


DRAFTER_COUNTERS = (
    "pilotfish_drafter_proposals_total",
    "pilotfish_drafter_drafted_tokens_total",
    "pilotfish_drafter_accepted_tokens_total",
)
PRUNER_COUNTERS = ("pilotfish_pruner_visual_tokens_total", "pilotfish_pruner_dropped_tokens_total")

DRAFTERS = (
    PluginCase("drafter", "token_recycling", ("ordr", "order"), ("k", "eight"), {"k": 4}, DRAFTER_COUNTERS),
    PluginCase("drafter", "rasd", ("max_matsh", "max_match"), ("prune", "much"), {"prune": 0.0}, DRAFTER_COUNTERS),
)
KV_POLICIES = (
    PluginCase(
        "kv",
        "tidal_decode",
        ("budgett", "budget"),
        ("select_layers", 2),
        {"budget": 64, "sinks": 4, "recent": 8, "granularity": "token", "full_layers": [], "select_layers": [0]},
    ),
    PluginCase(
        "kv",
        "razor_attention",
        ("windw", "window"),
        ("compensation", 1),
        {"keep": [[0, 0]], "window": 32, "ratio": 0},
        ("pilotfish_kv_freed_blocks_total",),
    ),
    PluginCase(
        "kv",
        "streaming_llm",
        ("budgett", "budget"),
        ("sinks", "four"),
        {"budget": 36, "sinks": 4},
        ("pilotfish_kv_freed_blocks_total",),
    ),
    PluginCase(
        "kv", "quest", ("budgett", "budget"), ("full_layers", [2]), {"budget": 128, "recent": 0, "full_layers": 0}
    ),
)
PRUNERS = (
    PluginCase("pruner", "globalcom2", ("retian", "retain"), ("temperature", "hot"), {"retain": 0.5}, PRUNER_COUNTERS),
    PluginCase("pruner", "aim", ("merge_step", "merge_steps"), ("order", 1), {"merge_steps": 1}, PRUNER_COUNTERS),
    PluginCase("pruner", "diversity", ("methd", "method"), ("retain", None), {"retain": 0.5}, PRUNER_COUNTERS),
)
INDEXES = (
    PluginCase("index", "xtr", ("nlists", "nlist"), ("nlist", "many")),
    PluginCase("index", "vdr", ("topp", "top"), ("top", "all")),
    PluginCase("index", "bm25", ("k11", "k1"), ("k1", "high")),
    PluginCase("index", "dense", ("codec", ""), None),  # has no options
    PluginCase("index", "hybrid", ("memberz", "members"), ("members", 3)),
)
ENGINE_PLUGINS = (*DRAFTERS, *KV_POLICIES, *PRUNERS)
ALL_PLUGINS = (*ENGINE_PLUGINS, *INDEXES)
