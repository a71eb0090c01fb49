"""Configuration of multi-vector checkpoints on disk: backbone, projection, prefixes and lengths.

| format | recognised by | projection |
|---|---|---|
| XTR (`google/xtr-base-en`) | a T5 encoder, `2_Dense` | 128 x 768, no bias |
| PyLate, sentence-transformers | `modules.json` with Dense modules | the Dense modules, in order |
| Stanford ColBERT | `artifact.metadata`, and `linear.weight` among the tensors of the model | 128 x width |
| other | | none: the hidden states of the backbone |
"""

import hashlib
import json
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RetrievalError
from .tokenization import quiet_loading

QUERY, DOCUMENT = 64, 256  # default lengths in tokens
T5_QUERY, T5_DOCUMENT = 32, 512  # lengths of XTR


@dataclass(frozen=True)
class Layer:
    """Linear layer after the backbone: [out, in] weight and optional [out] bias."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Configuration of a checkpoint, by which texts are encoded as its authors do.

    Attributes:
        folder: Folder of the checkpoint.
        backbone: Folder of the transformer in it.
        layers: Linear layers after the transformer.
        t5: Whether the transformer is the encoder of a T5.
        query_prefix: Text that is prepended to queries.
        document_prefix: Text that is prepended to documents.
        query_marker: Token that is inserted after the first token of a query.
        document_marker: Token that is inserted after the first token of a document.
        query_length: Maximum number of tokens of a query, special tokens included.
        document_length: Maximum number of tokens of a document, special tokens included.
        expansion: Whether queries are padded to their maximum length with mask tokens, whose vectors count (ColBERT).
        attends: Whether other tokens attend to these mask tokens.
        skipped: Tokens of documents whose vectors are dropped (punctuation in ColBERT).
        lower: Whether texts are lowercased first.
        pooling: Pooling of token vectors to one vector: `mean`, or `cls` for the first token.
    """

    folder: Path
    backbone: Path
    layers: tuple[Layer, ...] = ()
    t5: bool = False
    query_prefix: str = ""
    document_prefix: str = ""
    query_marker: str | None = None
    document_marker: str | None = None
    query_length: int = QUERY
    document_length: int = DOCUMENT
    expansion: bool = False
    attends: bool = False
    skipped: tuple[str, ...] = field(default=())
    lower: bool = False
    pooling: str = "mean"

    def fingerprint(self) -> str:
        """Return the fingerprint of the checkpoint; see `checkpoint_fingerprint`."""
        return checkpoint_fingerprint(self.folder)


def checkpoint_fingerprint(folder: Path) -> str:
    """Return a digest (16 hex digits) of the weights and configuration files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model", ".metadata"):
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration of a checkpoint.

    Raises:
        RetrievalError: The folder contains no model.
    """
    if not folder.is_dir():
        raise RetrievalError(f"encoder {folder}: no such folder; give the path of a checkpoint on disk")
    modules = read_json(folder / "modules.json")
    backbone = folder
    if isinstance(modules, list) and modules:
        backbone = folder / modules[0].get("path", "")
    config = read_json(backbone / "config.json")
    if not isinstance(config, dict):
        raise RetrievalError(f"encoder {folder}: there is no config.json of a model")
    dense = [m["path"] for m in modules or [] if str(m.get("type", "")).endswith("Dense")]
    if not dense and (folder / "2_Dense").is_dir():
        dense = ["2_Dense"]
    layers = tuple(_dense(folder / path) for path in dense)
    settings = read_json(folder / "config_sentence_transformers.json") or {}
    colbert = read_json(folder / "artifact.metadata")
    if str(config.get("model_type", "")) in ("t5", "mt5"):
        return Checkpoint(
            folder, backbone, layers, True, query_length=T5_QUERY, document_length=T5_DOCUMENT, lower=True
        )
    if isinstance(colbert, dict):
        linear = _tensor(backbone, "linear.weight")
        return Checkpoint(
            folder,
            backbone,
            (Layer(linear),),
            query_marker="[unused0]",
            document_marker="[unused1]",
            query_length=int(colbert.get("query_maxlen", 32)),
            document_length=int(colbert.get("doc_maxlen", 220)),
            expansion=True,
            attends=bool(colbert.get("attend_to_mask_tokens", False)),
            skipped=tuple(string.punctuation) if colbert.get("mask_punctuation", True) else (),
        )
    longest = int(config.get("max_position_embeddings", 512))
    pooling_config = read_json(folder / "1_Pooling" / "config.json") or {}
    return Checkpoint(
        folder,
        backbone,
        layers,
        query_prefix=str(settings.get("query_prefix") or ""),
        document_prefix=str(settings.get("document_prefix") or ""),
        query_length=int(settings.get("query_length") or min(QUERY, longest)),
        document_length=int(settings.get("document_length") or min(DOCUMENT, longest)),
        expansion=bool(settings.get("do_query_expansion", False)),
        attends=bool(settings.get("attend_to_expansion_tokens", False)),
        skipped=tuple(settings.get("skiplist_words") or ()),
        pooling="cls" if pooling_config.get("pooling_mode_cls_token") else "mean",
    )


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file, or None if there is no file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetrievalError(f"encoder {path}: cannot be read ({error})") from None


def _dense(folder: Path) -> Layer:
    """Read a Dense module of sentence-transformers.

    Raises:
        RetrievalError: The module has an activation function, which no known multi-vector model has.
    """
    activation = str((read_json(folder / "config.json") or {}).get("activation_function", "Identity"))
    if not activation.endswith("Identity"):
        raise RetrievalError(f"encoder {folder}: activation {activation} is not supported, only Identity")
    return Layer(_tensor(folder, "linear.weight"), _tensor(folder, "linear.bias", needed=False))


def _tensor(folder: Path, name: str, needed: bool = True) -> Any:
    """Read a tensor from the weights in a folder as float32, without unpickling objects."""
    import torch
    from safetensors import safe_open

    with quiet_loading(f"encoder {folder}"):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118 -- not a mapping
                    return file.get_tensor(name).float().numpy()
        for path in sorted(folder.glob("*.bin")):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if name in state:
                return state[name].float().numpy()
    if needed:
        raise RetrievalError(f"encoder {folder}: its weights hold no {name}")
    return None
