"""Models from token ids to each word's greatest logit. Import this late: it imports torch."""

from typing import Any

import torch

CHUNK = 2048  # words at once: logits of all of them would leave the processor's cache, and take twice the time


class TiedVocabulary(torch.nn.Module):
    """VDR's: LayerNorm, then products with the word embeddings from number ``shift`` on.

    Names of parameters are those of published checkpoints.
    """

    def __init__(self, bert_model: Any, shift: int) -> None:
        super().__init__()
        self.bert_model, self.shift = bert_model, shift
        self.ln = torch.nn.LayerNorm(bert_model.config.hidden_size)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[texts, tokens] ids and attention mask to [texts, words]."""
        hidden = self.ln(self.bert_model(input_ids=ids, attention_mask=mask).last_hidden_state)
        return max_over_tokens(hidden, mask, self.bert_model.embeddings.word_embeddings.weight[self.shift :], None)


class MaskedLM(torch.nn.Module):
    """A masked language model, of whatever family.

    What stands before its last linear layer is the model's own; the layer itself is applied by `greatest`.
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
        """[texts, tokens] ids and attention mask to [texts, words]."""
        hidden = self.model(input_ids=ids, attention_mask=mask).logits
        if not isinstance(self.last, torch.nn.Linear):  # quantised
            return _over_tokens(self.last(hidden), mask)
        return max_over_tokens(hidden, mask, self.last.weight, self.last.bias)


def max_over_tokens(
    hidden: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The greatest of ``hidden @ weight.T + bias`` over the tokens of each text.

    Args:
        hidden: [texts, tokens, width].
        mask: [texts, tokens] 1 for tokens that count.
        weight: [words, width].
        bias: [words], or None.

    Returns:
        [texts, words].
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
