"""What all encoders need that run a transformer: a tokenizer for one thread at a time, batches, precisions, chunks."""

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ..errors import RetrievalError, first_line

BATCH_TOKENS = 8192  # of a batch, padding included
REMEMBERED = 1024  # queries that are kept
PRECISIONS = ("float32", "bfloat16", "float16", "int8")
Progress = Callable[[int], None]  # is told how many texts were encoded since it was told last
T = TypeVar("T")


def token_batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Rows of like lengths, the longest first, each batch of about so many tokens with its padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for row in order:
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def pick_device(device: str) -> str:
    """`auto` is a GPU where there is one.

    Raises:
        RetrievalError: there is no such device.
    """
    import torch

    found = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if found else []), *(f"cuda:{i}" for i in range(found))]
    if device == "auto":
        return "cuda" if found else "cpu"
    if device not in known:
        raise RetrievalError(f"device {device}: expected auto, {', '.join(known)}")
    return device


@contextlib.contextmanager
def quiet_loading(what: str) -> Iterator[None]:
    """Load a checkpoint, without the news that transformers has of it.

    Raises:
        RetrievalError: its files are not what they should be; ``what`` says whose.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers.utils import logging

    wrong = OSError, ValueError, KeyError, ImportError, RuntimeError, EOFError, SafetensorError, UnpicklingError
    kept = logging.get_verbosity()
    logging.set_verbosity_error()  # a pooler that is not needed is no news
    logging.disable_progress_bar()
    try:
        yield
    except RetrievalError:
        raise
    except wrong as error:
        raise RetrievalError(f"{what}: {first_line(error)}") from None
    finally:
        logging.set_verbosity(kept)


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that is none, or that a device has not, before a model is loaded.

    Raises:
        RetrievalError: it is so.
    """
    if precision not in PRECISIONS:
        raise RetrievalError(f"precision {precision}: expected {', '.join(PRECISIONS)}")
    if precision == "int8" and device != "cpu":
        raise RetrievalError(f"precision int8 runs on a CPU, not on {device}")


def cast_model(model: Any, precision: str, device: str) -> Any:
    """A model on a device; with another precision than float32 it is a copy."""
    import torch

    if precision == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says where this will move
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    if precision == "float32":
        return model.to(device)
    import copy

    return copy.deepcopy(model).to(device, getattr(torch, precision))


def token_chunks(tokenizer: Any, text: str, size: int, overlap: int) -> list[str]:
    """Pieces of a text of at most ``size`` tokens, each with ``overlap`` of the one before.

    The pieces are cut out of the text, nothing is rewritten.

    Raises:
        RetrievalError: they would not get on.
    """
    if not 0 <= overlap < size:
        raise RetrievalError(f"chunks of {size} tokens cannot overlap by {overlap}")
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return truncate_text(text, told["offset_mapping"], size, overlap)


def truncate_text(text: str, spans: Sequence[tuple[int, int]], size: int, overlap: int) -> list[str]:
    """Pieces of a text of at most ``size`` spans (begin and end of each token), ``overlap`` of the one before."""
    if len(spans) <= size:
        return [text]
    begins = range(0, max(len(spans) - overlap, 1), size - overlap)
    return [text[spans[b][0] : spans[min(b + size, len(spans)) - 1][1]] for b in begins]


class LRUCache(Generic[T]):
    """What was made of queries that were asked lately."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._mutex = threading.Lock()

    def get(self, texts: Sequence[str], make: Callable[[list[str]], Sequence[T]]) -> list[T]:
        """For each text what ``make`` makes of it, now or before."""
        with self._mutex:
            found = {t: self._kept[t] for t in texts if t in self._kept}
        new = [t for t in dict.fromkeys(texts) if t not in found]
        if new:
            found.update(zip(new, make(new), strict=True))
        with self._mutex:
            self._kept.update(found)
            for text in found:
                self._kept.move_to_end(text)
            while len(self._kept) > REMEMBERED:
                self._kept.popitem(last=False)
        return [found[t] for t in texts]
