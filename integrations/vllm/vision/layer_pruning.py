"""EXPERIMENTAL: pruning of visual tokens inside the language model (AIM, arXiv 2412.03248, section 3.3).

Hidden states of pruned tokens are dropped after a layer. Deeper layers get separate attention metadata: fewer query
tokens, and keys and values packed into the first slots of the same blocks. Keys are stored after the rotary embedding,
so packing does not change attention. In later steps of the request, each layer subtracts the number of its pruned
tokens from the sequence length.

Prompts must be processed whole, and blocks must not be shared or freed; `compatibility.check` checks the first two.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from ....plugins.contracts import LayerSchedule
from ....plugins.pruning.importance import keep_visual_tokens, page_rank


@dataclass
class PrunedBatch:
    """Requests of one step, on the host.

    Attributes:
        starts: [requests + 1] index of the first query token of each request.
        lengths: [requests] number of tokens of each request, including those of this step.
        table: [requests, blocks] block table.
        names: [requests] key of each request while it runs: its first block, which no other request uses.
    """

    starts: list[int]
    lengths: list[int]
    table: Tensor
    names: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.names = self.table[: len(self.lengths), 0].tolist()

    def rows(self, request: int) -> slice:
        """Return the slice of a request's query tokens."""
        return slice(self.starts[request], self.starts[request + 1])

    def counts(self) -> list[int]:
        """Return the number of query tokens of each request."""
        return [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]


class LayerPruning:
    """Forward pass of a language model with fewer visual tokens in each deeper layer.

    Args:
        layers: Decoder layers, each called with positions, hidden states and residual.
        norm: Norm after the last layer.
        schedule: Share of visual tokens that each layer keeps.
        vllm_config: vLLM's configuration of the engine.
    """

    def __init__(self, layers: Any, norm: Any, schedule: LayerSchedule, vllm_config: Any) -> None:
        self._layers, self._norm, self._schedule, self._config = list(layers), norm, schedule, vllm_config
        self._attention = [layer.self_attn.attn for layer in self._layers]
        self._builder: Any = None
        self._dropped: dict[int, list[int]] = {}  # by request: number of tokens that each layer lacks
        self._seen: tuple[Tensor, Tensor] | None = None
        for attention in self._attention[schedule.first : schedule.last]:
            attention.register_forward_pre_hook(self._see)

    def _see(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self._seen = inputs[0], inputs[1]

    def forward(self, positions: Tensor, embeds: Tensor, visual: Tensor | None) -> Tensor | None:
        """Compute the hidden states of a step that contains prompts with images.

        Args:
            positions: [rows] position of each query token.
            embeds: [rows, width] input embeddings.
            visual: [rows] bool mask of visual tokens; None in a step without images.

        Returns:
            [rows, width] hidden states, 0 for pruned tokens; None in other steps, which vLLM's forward computes.
        """
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # memory profiling
            return None
        stock = context.attn_metadata[self._attention[0].layer_name]
        batch = PrunedBatch(stock.query_start_loc.tolist(), stock.seq_lens.tolist(), stock.block_table)
        pruned = []
        for request, (rows, length) in enumerate(zip(batch.counts(), batch.lengths, strict=True)):
            if rows == length:  # a new request: the previous owner of its first block has ended
                self._dropped.pop(batch.names[request], None)
                if visual is not None and bool(visual[batch.rows(request)].any()):
                    pruned.append(request)
        if pruned:
            assert visual is not None
            return self._prefill(context, batch, positions, embeds, visual, pruned)
        if any(name in self._dropped for name in batch.names):
            for layer in range(len(self._layers)):
                self._place(context, layer, batch, batch.counts(), self._lacking(batch, layer))
        return None

    def _lacking(self, batch: PrunedBatch, layer: int) -> list[int]:
        return [self._dropped[name][layer] if name in self._dropped else 0 for name in batch.names]

    def _prefill(
        self, context: Any, batch: PrunedBatch, positions: Tensor, embeds: Tensor, visual: Tensor, pruned: list[int]
    ) -> Tensor:
        n, requests = batch.starts[-1], len(batch.lengths)
        hidden, residual, positions = embeds[:n], None, positions[:n]
        row = torch.arange(n, device=hidden.device)
        request = torch.repeat_interleave(torch.arange(requests), torch.tensor(batch.counts())).to(hidden.device)
        prunable = torch.zeros(requests, dtype=torch.bool, device=hidden.device)
        prunable[pruned] = True
        visual = visual[:n].to(hidden.device) & prunable[request]
        visual[torch.tensor(batch.starts[1:]) - 1] = False  # the token to sample from is always kept
        num_visual = torch.bincount(request[visual], minlength=requests).tolist()
        for r in pruned:
            self._dropped[batch.names[r]] = [0] * len(self._layers)
        num_pruned = [0] * requests
        for i, layer in enumerate(self._layers):
            for r in pruned:
                self._dropped[batch.names[r]][i] = num_pruned[r]
            counts = torch.bincount(request, minlength=requests).tolist()
            self._place(context, i, batch, counts, self._lacking(batch, i))
            hidden, residual = layer(positions, hidden, residual)
            share = self._schedule.kept_share(i)
            if share == 1.0 or not bool(visual.any()):
                continue
            keep = torch.ones_like(visual)
            for r in pruned:
                indices = (request == r).nonzero().flatten()
                keep[indices] = self._kept(i, indices, visual[indices], int(num_visual[r] * share))
                num_pruned[r] += int((~keep[indices]).sum())
            hidden, residual, positions = hidden[keep], residual[keep], positions[keep]
            row, request, visual = row[keep], request[keep], visual[keep]
        hidden, _ = self._norm(hidden, residual)
        out = hidden.new_zeros(len(embeds), hidden.shape[1])
        out[row] = hidden
        return out

    def _kept(self, layer: int, mine: Tensor, visual: Tensor, count: int) -> Tensor:
        """Return the mask of one request's tokens that are kept after a layer.

        Args:
            layer: Index of the layer.
            mine: Indices of the request's tokens among those of the step.
            visual: Mask of the request's visual tokens.
            count: Number of visual tokens to keep.
        """
        if count == 0:
            return ~visual
        attention = self._layers[layer].self_attn
        assert self._seen is not None
        query, key = self._seen[0][mine], self._seen[1][mine]
        query, key = query.view(len(mine), attention.num_heads, -1), key.view(len(mine), attention.num_kv_heads, -1)
        schedule = self._schedule
        rank = page_rank(query, key, attention.scaling, schedule.temperature, schedule.iterations)
        return keep_visual_tokens(rank, visual, count)

    def _place(self, context: Any, layer: int, batch: PrunedBatch, counts: list[int], lacking: list[int]) -> None:
        """Set the attention metadata and slot mapping of a layer for the tokens that it processes."""
        if not any(lacking) and counts == batch.counts():
            return
        name, device = self._attention[layer].layer_name, batch.table.device
        block_size = self._config.cache_config.block_size
        lengths = [length - missing for length, missing in zip(batch.lengths, lacking, strict=True)]
        slots = []
        for r, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            at = torch.arange(length - count, length, device=device)
            slots.append(batch.table[r, at // block_size].long() * block_size + at % block_size)
        slot_mapping = torch.cat(slots).to(context.slot_mapping[name].dtype)
        starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(counts).cumsum(0)
        if self._builder is None:
            attention = self._attention[0]
            spec, names = attention.get_kv_cache_spec(self._config), [a.layer_name for a in self._attention]
            self._builder = attention.attn_backend.get_builder_cls()(spec, names, self._config, device)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            num_reqs=len(counts),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            block_table_tensor=batch.table,
            slot_mapping=slot_mapping,
        )
        context.attn_metadata[name] = self._builder.build(0, common)
        context.slot_mapping[name] = slot_mapping
