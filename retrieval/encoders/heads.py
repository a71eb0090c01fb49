"""Models that compute the largest logit of each vocabulary term. Import this module late: it imports torch."""

from typing import Any

import torch

CHUNK = 2048  # terms at once: the logits of all terms exceed the CPU cache, which doubles the time


class TiedVocabulary(torch.nn.Module):
    """Head of VDR: LayerNorm, then inner products with the word embeddings from index ``shift`` on.

    The names of the parameters are those of published checkpoints.
    """

    def __init__(self, bert_model: Any, shift: int) -> None:
        super().__init__()
        self.bert_model, self.shift = bert_model, shift
        self.ln = torch.nn.LayerNorm(bert_model.config.hidden_size)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the largest logits, [texts, terms], from token ids and attention mask, [texts, tokens]."""
        hidden = self.ln(self.bert_model(input_ids=ids, attention_mask=mask).last_hidden_state)
        return max_over_tokens(hidden, mask, self.bert_model.embeddings.word_embeddings.weight[self.shift :], None)


class MaskedLM(torch.nn.Module):
    """Masked language model of any architecture.

    The last linear layer is removed from the model and applied by `max_over_tokens`, term chunk by term chunk.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        last = model.get_output_embeddings()
        for parent in model.modules():
            for name, child in parent.named_children():
                if child is last:
                    setattr(parent, name, torch.nn.Identity())
        self.model, self.last = model, last

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the largest logits, [texts, terms], from token ids and attention mask, [texts, tokens]."""
        hidden = self.model(input_ids=ids, attention_mask=mask).logits
        if not isinstance(self.last, torch.nn.Linear):  # quantised to int8
            return _over_tokens(self.last(hidden), mask)
        return max_over_tokens(hidden, mask, self.last.weight, self.last.bias)


def max_over_tokens(
    hidden: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute the maximum of ``hidden @ weight.T + bias`` over the tokens of each text.

    Args:
        hidden: [texts, tokens, width] hidden states.
        mask: [texts, tokens] attention mask: 1 for tokens, 0 for padding.
        weight: [terms, width] weight of the last linear layer.
        bias: [terms] bias of the last linear layer, or None.

    Returns:
        [texts, terms] largest logits.
    """
    parts = []
    for begin in range(0, len(weight), CHUNK):
        part = slice(begin, begin + CHUNK)
        logits = torch.nn.functional.linear(hidden, weight[part], None if bias is None else bias[part])
        parts.append(_over_tokens(logits, mask))
    return torch.cat(parts, 1)


def _over_tokens(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if not bool(mask.all()):
        logits = logits.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf)
    return logits.amax(1)
