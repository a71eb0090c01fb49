"""Checkpoints by name: a folder, or a model of the Hugging Face hub, as in sentence-transformers."""

import re
from pathlib import Path

from ..errors import RetrievalError, first_line

_NAME = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?", re.ASCII)
_FILES = ("*.json", "*.txt", "*.model", "*.metadata", "*.safetensors", "*pytorch_model*.bin")
_REMEDY = "allow access to the hub once (unset HF_HUB_OFFLINE), or give the folder of a checkpoint with --encoder"


def find_checkpoint(name: str, remedy: str = _REMEDY) -> Path:
    """Return the folder of a checkpoint; one of the hub is downloaded on first use, with a progress bar.

    Args:
        name: Folder, or name on the hub; a name without an organization is one of sentence-transformers.
        remedy: Advice for the message if the hub cannot be reached.

    Raises:
        RetrievalError: There is no such folder, and the checkpoint is neither in the local cache nor reachable.
    """
    if Path(name).is_dir():
        return Path(name)
    if not _NAME.fullmatch(name):
        raise RetrievalError(f"encoder {name}: no such folder; give the path of a checkpoint on disk")
    from huggingface_hub import snapshot_download

    try:
        repository = name if "/" in name else f"sentence-transformers/{name}"
        return Path(snapshot_download(repository, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's errors have many types, those of its HTTP library among them
        raise RetrievalError(
            f"encoder {name}: no such folder, and it cannot be loaded from the hub ({first_line(error)}); {remedy}"
        ) from None
