"""Metadata builder and attention implementation shared by the tree-attention backends of all platforms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from .....kvcache import reference
from .....plugins.contracts import DraftTree, Unsupported
from ...engine import selection
from .. import compatibility

USE_CHAIN = "use verification=chain"


@dataclass(frozen=True)
class ScheduledTree:
    """Draft tree in the batch of a step.

    Attributes:
        index: Index of the request in the batch.
        first: Index of the root among the query tokens of the step; the n nodes follow it.
        position: Position of the root in the text.
        tree: Draft tree, cut to the scheduled nodes.
        tree_mask: [n + 1, n + 1] bool attention mask of the root and the nodes.
    """

    index: int
    first: int
    position: int
    tree: DraftTree
    tree_mask: NDArray[np.bool_]


class TreeMetadataBuilder:
    """Mixin that adds draft trees to vLLM's attention metadata builder, which has to follow it in the bases.

    Attributes:
        scheduled_trees: Draft trees of the next step; set by `TreeVerifier`.
        error: Error of the kernels' self-test; None if it passed.
        mover: Class that moves keys and values within the caches of layers.
    """

    error: str | None
    mover: ClassVar[type]

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.scheduled_trees: Sequence[ScheduledTree] = ()
        self._layers = attention_layers(vllm_config, layer_names)
        check_tree_layers(vllm_config, self._layers)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._moves: Any = None

    def tree_batch_arguments(
        self, slots: torch.Tensor
    ) -> tuple[list[int], list[int], list[int], list[NDArray[np.bool_]]]:
        """Return the leading constructor arguments of the kernels' tree batch, and remember the slot mapping.

        Args:
            slots: [tokens] slot mapping of the step.

        Returns:
            For each tree the index of its request, the index of its root among the query tokens, the number of tokens
            up to and including the root, and its attention mask.
        """
        self._slots = slots
        contexts = [p.position + 1 for p in self.scheduled_trees]
        return (
            [p.index for p in self.scheduled_trees],
            [p.first for p in self.scheduled_trees],
            contexts,
            [p.tree_mask for p in self.scheduled_trees],
        )

    def move_kv(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy keys and values of query tokens of the step to the slots of other query tokens, one after another.

        Args:
            source: Indices of the query tokens to copy.
            target: Indices of the query tokens whose slots are overwritten.
        """
        if self._moves is None:
            self._moves = self.mover(distinct_caches(self._layers))
        self._moves(self._slots[list(source)].long(), self._slots[list(target)].long())


class TreeImpl:
    """Mixin for the attention implementation of one layer; vLLM's has to follow it in the bases.

    Attributes:
        tree_attention: The platform's kernel for requests with a tree; vLLM's kernel serves the others.
    """

    tree_attention: ClassVar[Callable[..., None]]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute attention; shapes are those of vLLM's `AttentionImpl.forward`."""
        step = getattr(attn_metadata, "trees", None)
        others = attn_metadata if step is None else attn_metadata.others
        if step is None or others is not None:
            super().forward(layer, query, key, value, kv_cache, others, output, output_scale, output_block_scale)  # type: ignore[misc]
        if step is not None:
            self.tree_attention(query, kv_cache, attn_metadata.block_table, step, self.scale, output)  # type: ignore[attr-defined]
        return output


def max_error(
    query: torch.Tensor, output: torch.Tensor, keys: Any, values: Any, before: int, seen: NDArray[np.bool_]
) -> float:
    """Return the maximum absolute error of a kernel's tree attention against reference attention; for self-tests.

    Args:
        query: [rows, query_heads, head_size] queries of the root and the nodes.
        output: [rows, query_heads, head_size] output of the kernel.
        keys: [before + rows, kv_heads, head_size] float64.
        values: [before + rows, kv_heads, head_size] float64.
        before: Number of tokens before the root.
        seen: [rows, rows] bool attention mask of the root and the nodes.
    """
    worst = 0.0
    for row in range(len(query)):
        path = [*range(before), *(before + np.flatnonzero(seen[row]))]
        q = query[row].double().cpu().numpy()
        _, expected = reference.attention(q, keys[path], values[path], query.shape[-1] ** -0.5)
        worst = max(worst, float(abs(output[row].double().cpu().numpy() - expected).max()))
    return worst


def attention_layers(vllm_config: Any, names: list[str]) -> dict[str, Any]:
    """Return the attention layers of these names."""
    return get_layers_from_vllm_config(vllm_config, Attention, names)


def distinct_caches(layers: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the caches of layers, which may share one."""
    return list({layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers.values()}.values())


def no_trees(vllm_config: Any, reason: str, layer: str = "any") -> Unsupported:
    """Return the error that says why trees are not supported."""
    drafter = selection.read_config(vllm_config.additional_config).drafter
    plugin = "drafter" if drafter is None else drafter.name
    return Unsupported(plugin, reason, USE_CHAIN, vllm_config.model_config.model, layer)


def check_tree_layers(vllm_config: Any, layers: Mapping[str, Any]) -> None:
    """Check that our kernels support all layers.

    Args:
        vllm_config: vLLM's configuration of the engine.
        layers: Attention layers by name.

    Raises:
        Unsupported: A layer has a feature that our kernels do not support.
    """
    for name, layer in layers.items():
        reasons = compatibility.unsupported_features(layer.impl, 16)
        if compatibility.has_sliding_window(layer.impl):
            reasons.append("a sliding window")
        if reasons:
            raise no_trees(vllm_config, reasons[0], name)
