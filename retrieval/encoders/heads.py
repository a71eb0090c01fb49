"""Models from token ids to logits over a vocabulary. Import this late: it imports torch."""

from typing import Any

import torch


class TiedVocabulary(torch.nn.Module):
    """VDR's: LayerNorm, then products with the word embeddings from number ``shift`` on.

    Names of parameters are those of published checkpoints.
    """

    def __init__(self, bert_model: Any, shift: int) -> None:
        super().__init__()
        self.bert_model, self.shift = bert_model, shift
        self.ln = torch.nn.LayerNorm(bert_model.config.hidden_size)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[texts, tokens] ids and attention mask to [texts, tokens, words]."""
        hidden = self.bert_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.ln(hidden) @ self.bert_model.embeddings.word_embeddings.weight[self.shift :].t()


class MaskedLM(torch.nn.Module):
    """The head of a masked language model, whatever its family calls it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[texts, tokens] ids and attention mask to [texts, tokens, words]."""
        return self.model(input_ids=ids, attention_mask=mask).logits
