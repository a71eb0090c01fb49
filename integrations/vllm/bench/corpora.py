"""Texts for measurements of KV policies: files that others wrote, or a sample that every Python brings."""

from pathlib import Path
from typing import Any

from ....plugins.config import ConfigError
from ....retrieval.errors import first_line

CHARACTERS = 8  # of text for each token wanted, at most


def read_corpus(path: Path, flag: str = "--text") -> str:
    """A text file, or all ``.txt`` files of a folder, one behind the other.

    Raises:
        ConfigError: it cannot be read as text.
    """
    try:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}") from None
    if not text:
        raise ConfigError(f"{flag} {path}: there is no text")
    return text


def sample_corpus() -> str:
    """English prose that every Python brings: the reference pages that `help()` shows."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenizer_of(folder: str) -> Any:
    """A model's tokenizer, for texts longer than the model reads at once.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model {folder}: no tokenizer that can be used ({first_line(error)})") from None


def excerpts(tokenizer: Any, text: str, count: int, length: int, name: str) -> list[list[int]]:
    """Token ids, [count][length], of excerpts that begin at even distances in the text.

    Raises:
        ConfigError: the text is too short for excerpts that differ.
    """
    starts = [i * len(text) // count for i in range(count)]
    cut = [tokenizer(text[s : s + CHARACTERS * length], add_special_tokens=False)["input_ids"][:length] for s in starts]
    if short := [len(ids) for ids in cut if len(ids) < length]:
        # The last excerpts of a text that is long enough as a whole begin earlier.
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(whole) < length + count:
            raise ConfigError(f"{name}: {max(len(whole), *short)} tokens, at least {length + count} are needed")
        last = len(whole) - length
        cut = [whole[i * last // max(count - 1, 1) :][:length] for i in range(count)]
    return cut
