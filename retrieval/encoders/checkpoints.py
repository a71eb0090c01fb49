"""What a multi-vector checkpoint on disk says of itself: backbone, projection, prefixes and lengths.

| form | known by | projection |
|---|---|---|
| XTR (`google/xtr-base-en`) | a T5 encoder, `2_Dense` | 128 x 768, no bias |
| PyLate, sentence-transformers | `modules.json` with Dense modules | of each module, in order |
| Stanford ColBERT | `artifact.metadata`, `linear.weight` among the model's tensors | 128 x width |
| anything else | | none: the backbone's own vectors |
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

QUERY, DOCUMENT = 64, 256  # tokens, where a checkpoint says nothing
T5_QUERY, T5_DOCUMENT = 32, 512  # XTR's


@dataclass(frozen=True)
class Layer:
    """A linear layer behind the backbone: [out, in] weight, and perhaps a bias."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to encode as the checkpoint's authors do.

    Attributes:
        folder: Where it lies.
        backbone: Folder of the transformer within.
        layers: Linear layers behind it.
        t5: Whether only the encoder of a T5 is wanted.
        query_prefix: Put before a query's text.
        document_prefix: Likewise.
        query_marker: A token that is put behind the first one of a query.
        document_marker: Likewise.
        query_length: Tokens of a query at most, all told.
        document_length: Of a document.
        expansion: A query is filled up to its length with mask tokens (ColBERT), whose vectors count.
        attends: Whether other tokens look at those.
        skipped: Tokens of documents that are left out, punctuation with ColBERT.
        lower: Texts are written small first.
        pooling: How one vector comes of a text's: the `mean` of all, or that of the first token (`cls`).
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
        """Of the files that decide what vectors come out."""
        return checkpoint_fingerprint(self.folder)


def checkpoint_fingerprint(folder: Path) -> str:
    """Hex digest of a checkpoint's files."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model", ".metadata"):
            found.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Find out what a checkpoint is.

    Raises:
        RetrievalError: there is no model in the folder.
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
    told = read_json(folder / "config_sentence_transformers.json") or {}
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
    told_pooling = read_json(folder / "1_Pooling" / "config.json") or {}
    return Checkpoint(
        folder,
        backbone,
        layers,
        query_prefix=str(told.get("query_prefix") or ""),
        document_prefix=str(told.get("document_prefix") or ""),
        query_length=int(told.get("query_length") or min(QUERY, longest)),
        document_length=int(told.get("document_length") or min(DOCUMENT, longest)),
        expansion=bool(told.get("do_query_expansion", False)),
        attends=bool(told.get("attend_to_expansion_tokens", False)),
        skipped=tuple(told.get("skiplist_words") or ()),
        pooling="cls" if told_pooling.get("pooling_mode_cls_token") else "mean",
    )


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetrievalError(f"encoder {path}: cannot be read ({error})") from None


def _dense(folder: Path) -> Layer:
    """A Dense module of sentence-transformers.

    Raises:
        RetrievalError: it bends what it makes, which no multi-vector model does.
    """
    activation = str((read_json(folder / "config.json") or {}).get("activation_function", "Identity"))
    if not activation.endswith("Identity"):
        raise RetrievalError(f"encoder {folder}: activation {activation} is not supported, only Identity")
    return Layer(_tensor(folder, "linear.weight"), _tensor(folder, "linear.bias", needed=False))


def _tensor(folder: Path, name: str, needed: bool = True) -> Any:
    """A tensor of a folder's weights as float32; tensors are read, nothing is unpickled."""
    import torch
    from safetensors import safe_open

    with quiet_loading(f"encoder {folder}"):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118 -- it is no mapping
                    return file.get_tensor(name).float().numpy()
        for path in sorted(folder.glob("*.bin")):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if name in state:
                return state[name].float().numpy()
    if needed:
        raise RetrievalError(f"encoder {folder}: its weights hold no {name}")
    return None
