"""Metadata builder shared by the tree-attention backends of all platforms."""

from collections.abc import Mapping, Sequence
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
    """A tree in the batch of a step.

    Attributes:
        index: Of its request in the batch.
        first: Row of its root among the step's tokens; the nodes follow.
        position: Of its root in the text.
        tree: As it was scheduled.
        tree_mask: [n + 1, n + 1] which of them each sees.
    """

    index: int
    first: int
    position: int
    tree: DraftTree
    tree_mask: NDArray[np.bool_]


class TreeMetadataBuilder:
    """What builders of attention metadata know of trees; stands before vLLM's among the bases of a class.

    Attributes:
        scheduled_trees: The trees of the next step; set by `TreeVerifier`.
        error: What the self-test of the kernels found.
        mover: Moves tokens within the caches of layers.
    """

    error: str | None
    mover: ClassVar[type]

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.scheduled_trees: Sequence[ScheduledTree] = ()
        self._layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        check_tree_layers(vllm_config, self._layers)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._moves: Any = None

    def tree_batch_arguments(
        self, slots: torch.Tensor
    ) -> tuple[list[int], list[int], list[int], list[NDArray[np.bool_]]]:
        """What the kernels are told of the step's trees; ``slots`` are where its tokens go."""
        self._slots = slots
        contexts = [p.position + 1 for p in self.scheduled_trees]
        return (
            [p.index for p in self.scheduled_trees],
            [p.first for p in self.scheduled_trees],
            contexts,
            [p.tree_mask for p in self.scheduled_trees],
        )

    def move_kv(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Move keys and values of the step's query tokens to the places of others, one after the other."""
        if self._moves is None:
            caches = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in self._layers.values()}  # some share one
            self._moves = self.mover(list(caches.values()))
        self._moves(self._slots[list(source)].long(), self._slots[list(target)].long())


def max_error(
    query: torch.Tensor, output: torch.Tensor, keys: Any, values: Any, before: int, seen: NDArray[np.bool_]
) -> float:
    """How far a kernel's attention of a tree is from attention computed plainly; for self-tests.

    Args:
        query: [rows, query_heads, size] of the root and the nodes.
        output: What the kernel made of it, alike.
        keys: [before + rows, kv_heads, size] float64.
        values: As ``keys``.
        before: Positions before the root.
        seen: [rows, rows] which of them each sees.
    """
    worst = 0.0
    for row in range(len(query)):
        path = [*range(before), *(before + np.flatnonzero(seen[row]))]
        q = query[row].double().cpu().numpy()
        _, expected = reference.attention(q, keys[path], values[path], query.shape[-1] ** -0.5)
        worst = max(worst, float(abs(output[row].double().cpu().numpy() - expected).max()))
    return worst


def check_tree_layers(vllm_config: Any, layers: Mapping[str, Any]) -> None:
    """Refuse layers that compute what our kernels do not.

    Raises:
        Unsupported: naming the layer.
    """
    drafter = selection.read_config(vllm_config.additional_config).drafter
    for name, layer in layers.items():
        reasons = compatibility.unsupported_features(layer.impl, 16)
        if compatibility.is_windowed(layer.impl):
            reasons.append("a sliding window")
        if reasons:
            plugin = "drafter" if drafter is None else drafter.name
            raise Unsupported(plugin, reasons[0], USE_CHAIN, vllm_config.model_config.model, name)
