"""Models under training: from pairs to a loss, and to a checkpoint that encoders load."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from ..encoders import multi_vector, vdr
from ..encoders.checkpoints import read_json
from ..encoders.heads import TiedVocabulary
from ..errors import RetrievalError
from . import objectives
from .pairs import Pair

FLOOR = -4.0  # logits of words that mean nothing begin about here: elu1p makes .02 of it
SPREAD = 0.5  # of LayerNorm at the beginning


@dataclass(frozen=True)
class Lengths:
    """Tokens of queries and documents at most."""

    query: int
    document: int


class Task(ABC):
    """A model that is trained; see `VDRTask` and `XTRTask`.

    Attributes:
        model: It.
        about: With what it was begun: training that goes on has to be the same.
        families: Model types that it can be; empty for any encoder.
    """

    families: ClassVar[tuple[str, ...]] = ()
    model: torch.nn.Module

    def __init__(self, base: Path, lengths: Lengths, **options: Any) -> None:
        """Begin with a folder.

        Raises:
            RetrievalError: its model is of a family that cannot be trained for this.
        """
        from transformers import AutoTokenizer

        config = read_json(base / "config.json")
        family = config.get("model_type") if isinstance(config, dict) else None
        if family is None:
            raise RetrievalError(f"--base {base}: there is no config.json of a model")
        if family not in (self.families or (family,)) or family in ("t5", "mt5"):
            raise RetrievalError(f"--base {base}: a model of type {family} cannot be trained for this")
        self.lengths = lengths
        self.about = {"base": str(base.absolute()), **asdict(lengths), **options}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)

    @abstractmethod
    def loss(self, batch: Sequence[Pair]) -> tuple[torch.Tensor, float]:
        """The loss of a batch, and the share of queries whose own document is the best of it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a checkpoint."""

    def _tokens(self, texts: list[str], length: int) -> Any:
        return self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")


class VDRTask(Task):
    """VDR from a BERT encoder whose word embeddings become the vocabulary's side."""

    families: ClassVar[tuple[str, ...]] = ("bert",)

    def __init__(
        self, base: Path, lengths: Lengths, top: int = 768, semi: bool = False, mask_weight: float | None = None
    ) -> None:
        from transformers import BertModel

        super().__init__(base, lengths, top=top, semi=semi, mask=mask_weight)
        self.top, self.semi, self.mask_weight = top, semi, mask_weight
        bert = BertModel.from_pretrained(base, local_files_only=True, add_pooling_layer=False)
        self.model = TiedVocabulary(bert, vdr.SHIFT)
        with torch.no_grad():
            # Published checkpoints have no bias for words. What LayerNorm adds comes nearest to one the same for all.
            words = bert.embeddings.word_embeddings.weight[vdr.SHIFT :]
            floor = torch.linalg.lstsq(words, torch.full((len(words), 1), FLOOR)).solution
            self.model.ln.weight.fill_(SPREAD)
            self.model.ln.bias.copy_(floor.squeeze(1))

    def loss(self, batch: Sequence[Pair]) -> tuple[torch.Tensor, float]:
        """See `objectives.vdr`."""
        sides = [
            self._tokens([p.query for p in batch], self.lengths.query),
            self._tokens([p.document for p in batch], self.lengths.document),
        ]
        weights = [vdr.activate(self.model(s["input_ids"], s["attention_mask"]), "elu1p") for s in sides]
        bags = [self._bag(s["input_ids"], weights[0].shape[1]) for s in sides]
        loss = objectives.vdr_loss(*weights, *bags, top=self.top, semi=self.semi, mask_weight=self.mask_weight)
        return loss, _right(objectives.sparsity_loss(weights[0], bags[0], self.top) @ weights[1].t())

    @staticmethod
    def _bag(ids: torch.Tensor, words: int) -> torch.Tensor:
        return torch.zeros(len(ids), words + vdr.SHIFT).scatter(1, ids, 1.0)[:, vdr.SHIFT :]

    def save(self, folder: Path) -> None:
        """In the form of published checkpoints, one encoder for both sides."""
        config = self.model.bert_model.config.to_dict()
        side = {**config, "type": "vdr", "model_id": "", "shift_vocab_num": vdr.SHIFT, "topk": self.top}
        side |= {"pooling": "max", "norm": False}
        about = {
            "encoder_q": {**side, "max_len": self.lengths.query},
            "encoder_p": {**side, "max_len": self.lengths.document},
            "shared_encoder": True,
        }
        (folder / "config.json").write_text(json.dumps(about, indent=1, default=str), encoding="utf-8")
        state = {f"encoder_q.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        self.tokenizer.save_pretrained(folder)


class ProjectedTokens(torch.nn.Module):
    """A vector of length one for each token: a backbone and a linear layer without bias."""

    def __init__(self, backbone: Any, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = torch.nn.Linear(backbone.config.hidden_size, width, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[texts, tokens] to [texts, tokens, width]."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize(self.linear(hidden), dim=-1)


class XTRTask(Task):
    """XTR from any encoder of transformers."""

    def __init__(
        self, base: Path, lengths: Lengths, width: int = 128, retrieved: int = 256, temperature: float = 0.05
    ) -> None:
        from transformers import AutoModel

        super().__init__(base, lengths, width=width, retrieved=retrieved, temperature=temperature)
        self.retrieved, self.temperature = retrieved, temperature
        self.model = ProjectedTokens(AutoModel.from_pretrained(base, local_files_only=True), width)
        torch.nn.init.orthogonal_(self.model.linear.weight)

    def loss(self, batch: Sequence[Pair]) -> tuple[torch.Tensor, float]:
        """See `objectives.xtr`."""
        q = self._tokens([p.query for p in batch], self.lengths.query)
        d = self._tokens([p.document for p in batch], self.lengths.document)
        scores = objectives.xtr_loss(
            self.model(q["input_ids"], q["attention_mask"]),
            q["attention_mask"],
            self.model(d["input_ids"], d["attention_mask"]),
            d["attention_mask"],
            self.retrieved,
        )
        return objectives.rows(scores, self.temperature), _right(scores)

    def save(self, folder: Path) -> None:
        """In the form of sentence-transformers and PyLate."""
        self.model.backbone.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        dense = folder / "1_Dense"
        dense.mkdir(exist_ok=True)
        weight = self.model.linear.weight.detach().contiguous()
        save_file({"linear.weight": weight}, dense / "model.safetensors")
        identity = "torch.nn.modules.linear.Identity"
        about = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": False}
        (dense / "config.json").write_text(json.dumps({**about, "activation_function": identity}), encoding="utf-8")
        kinds = (("", "sentence_transformers.models.Transformer"), ("1_Dense", "sentence_transformers.models.Dense"))
        modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)]
        (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        told = {"query_length": self.lengths.query, "document_length": self.lengths.document}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(told), encoding="utf-8")


def _right(scores: torch.Tensor) -> float:
    """The share of rows whose greatest score is on the diagonal."""
    return float((scores.argmax(1) == torch.arange(len(scores))).float().mean())


def base_of(name: str) -> Path:
    """The folder of an encoder to begin with: ``minilm``, or a folder itself."""
    return multi_vector.find_packaged_minilm() if name == multi_vector.MINILM else Path(name)
