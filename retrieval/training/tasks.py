"""Training tasks: a model, its loss over a batch of pairs, and the checkpoint that encoders load."""

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

INITIAL_LOGIT = -4.0  # of irrelevant terms: elu1p makes a weight of .02 of it
INITIAL_SCALE = 0.5  # of LayerNorm


@dataclass(frozen=True)
class Lengths:
    """Largest number of tokens of queries and of documents."""

    query: int
    document: int


class Task(ABC):
    """Base class of training tasks.

    Attributes:
        model: The model that is trained.
        about: The options with which the task was made; a resumed training must have the same.
        families: Model types that can be trained; empty for any encoder.
    """

    families: ClassVar[tuple[str, ...]] = ()
    model: torch.nn.Module

    def __init__(self, base: Path, lengths: Lengths, **options: Any) -> None:
        """Load the initial model.

        Args:
            base: Folder of the initial model.
            lengths: Largest numbers of tokens.
            options: Options of the task, kept in ``about``.

        Raises:
            RetrievalError: The folder has no model, or one of a type that cannot be trained for this task.
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
        """Return the loss of a batch, and the share of queries whose document has the highest score of the batch."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the encoder to a folder."""

    def _tokens(self, texts: list[str], length: int) -> Any:
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return encoded.to(next(self.model.parameters()).device)


class VDRTask(Task):
    """Train VDR from a BERT encoder, whose word embeddings become the output vocabulary."""

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
            # Published checkpoints have no bias per term: use LayerNorm's bias that is closest to one logit for all.
            terms = bert.embeddings.word_embeddings.weight[vdr.SHIFT :]
            floor = torch.linalg.lstsq(terms, torch.full((len(terms), 1), INITIAL_LOGIT)).solution
            self.model.ln.weight.fill_(INITIAL_SCALE)
            self.model.ln.bias.copy_(floor.squeeze(1))

    def loss(self, batch: Sequence[Pair]) -> tuple[torch.Tensor, float]:
        """Compute VDR's loss, see `objectives.vdr_loss`."""
        sides = [
            self._tokens([p.query for p in batch], self.lengths.query),
            self._tokens([p.document for p in batch], self.lengths.document),
        ]
        weights = [vdr.activate(self.model(s["input_ids"], s["attention_mask"]), "elu1p") for s in sides]
        bags = [self._bag(s["input_ids"], weights[0].shape[1]) for s in sides]
        loss = objectives.vdr_loss(*weights, *bags, top=self.top, semi=self.semi, mask_weight=self.mask_weight)
        return loss, _accuracy(objectives.sparsity_loss(weights[0], bags[0], self.top) @ weights[1].t())

    @staticmethod
    def _bag(ids: torch.Tensor, terms: int) -> torch.Tensor:
        bags = torch.zeros(len(ids), terms + vdr.SHIFT, device=ids.device)
        return bags.scatter(1, ids, 1.0)[:, vdr.SHIFT :]

    def save(self, folder: Path) -> None:
        """Write the encoder in the format of published VDR checkpoints, one encoder for queries and documents."""
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
    """A vector of length one for each token: a backbone and a linear projection without bias."""

    def __init__(self, backbone: Any, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = torch.nn.Linear(backbone.config.hidden_size, width, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return token vectors [texts, tokens, width] of token ids and mask [texts, tokens]."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize(self.linear(hidden), dim=-1)


class XTRTask(Task):
    """Train XTR from any encoder of transformers."""

    def __init__(
        self, base: Path, lengths: Lengths, width: int = 128, retrieved: int = 256, temperature: float = 0.05
    ) -> None:
        from transformers import AutoModel

        super().__init__(base, lengths, width=width, retrieved=retrieved, temperature=temperature)
        self.retrieved, self.temperature = retrieved, temperature
        self.model = ProjectedTokens(AutoModel.from_pretrained(base, local_files_only=True), width)
        torch.nn.init.orthogonal_(self.model.linear.weight)

    def loss(self, batch: Sequence[Pair]) -> tuple[torch.Tensor, float]:
        """Compute the cross-entropy of XTR's scores, see `objectives.xtr_scores`."""
        q = self._tokens([p.query for p in batch], self.lengths.query)
        d = self._tokens([p.document for p in batch], self.lengths.document)
        scores = objectives.xtr_scores(
            self.model(q["input_ids"], q["attention_mask"]),
            q["attention_mask"],
            self.model(d["input_ids"], d["attention_mask"]),
            d["attention_mask"],
            self.retrieved,
        )
        return objectives.row_cross_entropy(scores, self.temperature), _accuracy(scores)

    def save(self, folder: Path) -> None:
        """Write the encoder in the format of sentence-transformers and PyLate."""
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
        settings = {"query_length": self.lengths.query, "document_length": self.lengths.document}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")


def _accuracy(scores: torch.Tensor) -> float:
    """Return the share of rows whose largest score is on the diagonal."""
    return float((scores.argmax(1) == torch.arange(len(scores), device=scores.device)).float().mean())


def base_folder(name: str) -> Path:
    """Return the folder of the initial model: that of ``minilm``, or the named folder."""
    return multi_vector.find_packaged_minilm() if name == multi_vector.MINILM else Path(name)
