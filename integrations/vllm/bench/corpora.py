"""Texts for benchmarks of KV policies: text files of the user, or a sample that ships with Python."""

from pathlib import Path
from typing import Any

from ....plugins.config import ConfigError
from ....retrieval.errors import first_line

CHARACTERS = 8  # upper bound of characters per token, by which a text is cut before it is tokenized


def read_corpus(path: Path, flag: str = "--text") -> str:
    """Read a text file, or all ``.txt`` files of a folder, concatenated.

    Raises:
        ConfigError: The files cannot be read as text.
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
    """Return English prose that ships with Python: the reference pages that `help()` shows."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenizer_of(folder: str) -> Any:
    """Load the tokenizer of a model, without the model's limit on the length of a text.

    Raises:
        ConfigError: The model has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model {folder}: no tokenizer that can be used ({first_line(error)})") from None


def excerpts(tokenizer: Any, text: str, count: int, length: int, name: str) -> list[list[int]]:
    """Return token ids, [count][length], of excerpts that begin at even distances in the text.

    Raises:
        ConfigError: The text is too short for ``count`` different excerpts.
    """
    starts = [i * len(text) // count for i in range(count)]
    cut = [tokenizer(text[s : s + CHARACTERS * length], add_special_tokens=False)["input_ids"][:length] for s in starts]
    if short := [len(ids) for ids in cut if len(ids) < length]:
        # The last excerpts were cut off: begin all of them earlier if the text is long enough.
        all_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(all_ids) < length + count:
            raise ConfigError(f"{name}: {max(len(all_ids), *short)} tokens, at least {length + count} are needed")
        last = len(all_ids) - length
        cut = [all_ids[i * last // max(count - 1, 1) :][:length] for i in range(count)]
    return cut
