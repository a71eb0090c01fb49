"""BERT in NumPy for the few tokens of a query: a search starts without importing torch and transformers."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..token_embeddings import TokenEmbeddings
from .checkpoints import Checkpoint, read_json

MOST_QUERIES = 4  # larger batches are encoded by torch
_erf = np.frompyfunc(math.erf, 1, 1)


class BertQueries:
    """Encoder of queries with a BERT checkpoint, in float32 on the CPU."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, weights: dict[str, NDArray], config: dict) -> None:
        self._checkpoint, self._tokenizer, self._weights = checkpoint, tokenizer, weights
        self.width, self._heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        self._num_layers, self._eps = int(config["num_hidden_layers"]), float(config.get("layer_norm_eps", 1e-12))

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "BertQueries | None":
        """Load a checkpoint; None if it is not a plain BERT, or its queries need more than its tokenizer."""
        config, tokenizer = read_json(checkpoint.backbone / "config.json"), checkpoint.backbone / "tokenizer.json"
        c = checkpoint
        special = c.query_prefix or c.query_marker or c.expansion or c.lower or c.skipped or c.t5
        if special or not isinstance(config, dict) or not tokenizer.is_file():
            return None
        usual = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        if any(config.get(key, value) != value for key, value in usual.items()) or config.get("model_type") != "bert":
            return None
        try:
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer

            weights = load_file(checkpoint.backbone / "model.safetensors")
            loaded = Tokenizer.from_file(str(tokenizer))
            loaded.no_padding()
            loaded.enable_truncation(c.query_length)
            if not all(w.dtype in (np.float32, np.int64) for w in weights.values()):
                return None
            made = cls(checkpoint, loaded, {k.removeprefix("bert."): w for k, w in weights.items()}, config)
            made.encode("test")
        except Exception:  # torch loads it, or reports what is wrong
            return None
        return made

    def encode(self, query: str) -> TokenEmbeddings:
        """Encode one query; the vectors are rounded to float16 as those of documents are."""
        ids = np.array(self._tokenizer.encode(query).ids, np.int32)
        hidden = self._forward(ids)
        pooled = hidden[:1] if self._checkpoint.pooling == "cls" else hidden.mean(0, keepdims=True)
        for layer in self._checkpoint.layers:
            hidden = hidden @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        vectors = _normalized(hidden).astype(np.float16).astype(np.float32)
        return TokenEmbeddings(vectors, ids, np.array([len(ids)], np.int64), _normalized(pooled))

    def _forward(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the last hidden states of a token sequence, [tokens, width]."""
        w, tokens = self._weights, len(ids)
        hidden = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:tokens]
        hidden = self._layer_norm(hidden + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(self._num_layers):
            name = f"encoder.layer.{i}"
            q, k, v = (
                self._linear(hidden, f"{name}.attention.self.{part}").reshape(tokens, self._heads, -1).swapaxes(0, 1)
                for part in ("query", "key", "value")
            )
            scores = q @ k.swapaxes(1, 2) / np.float32(math.sqrt(q.shape[-1]))
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            attended = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(tokens, -1)
            attended = self._linear(attended, f"{name}.attention.output.dense")
            hidden = self._layer_norm(hidden + attended, f"{name}.attention.output.LayerNorm")
            inner = self._linear(hidden, f"{name}.intermediate.dense")
            inner *= (1 + np.asarray(_erf(inner / math.sqrt(2)), np.float32)) / 2  # GELU
            hidden = self._layer_norm(hidden + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return hidden

    def _linear(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _layer_norm(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self._eps))
        return x * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


@functools.lru_cache(maxsize=1)
def has_gpu() -> bool:
    """Return whether there may be a GPU, without importing torch."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def _normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
