"""Shared parts of the transformer encoders: devices, precisions, batches, chunks and a query cache."""

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ..errors import RetrievalError, first_line

BATCH_TOKENS = 8192  # maximum number of tokens per batch, padding included
REMEMBERED = 1024  # maximum number of cached queries
PRECISIONS = ("float32", "bfloat16", "float16", "int8")
Progress = Callable[[int], None]  # called with the number of texts encoded since the last call
T = TypeVar("T")


def token_batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Group rows by length into batches of at most ``tokens`` tokens with padding (or one row), longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pick_device(device: str) -> str:
    """Return the device to use; `auto` is a GPU if there is one.

    Raises:
        RetrievalError: The device does not exist.
    """
    import torch

    gpus = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device not in known:
        raise RetrievalError(f"device {device}: expected auto, {', '.join(known)}")
    return device


@contextlib.contextmanager
def quiet_loading(what: str) -> Iterator[None]:
    """Suppress the log output of transformers while a checkpoint is loaded.

    Raises:
        RetrievalError: The checkpoint cannot be loaded; ``what`` names it in the error message.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers.utils import logging

    load_errors = OSError, ValueError, KeyError, ImportError, RuntimeError, EOFError, SafetensorError, UnpicklingError
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # for example of an unused pooler
    logging.disable_progress_bar()
    try:
        yield
    except RetrievalError:
        raise
    except load_errors as error:
        raise RetrievalError(f"{what}: {first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)


def check_precision(precision: str, device: str) -> None:
    """Check that a device supports a precision, before a model is loaded.

    Raises:
        RetrievalError: The precision is unknown, or the device does not support it.
    """
    if precision not in PRECISIONS:
        raise RetrievalError(f"precision {precision}: expected {', '.join(PRECISIONS)}")
    if precision == "int8" and device != "cpu":
        raise RetrievalError(f"precision int8 runs on a CPU, not on {device}")


def cast_model(model: Any, precision: str, device: str) -> Any:
    """Move a model to a device, and convert a copy of it if the precision is not float32."""
    import torch

    if precision == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warning of torch.ao
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    if precision == "float32":
        return model.to(device)
    import copy

    return copy.deepcopy(model).to(device, getattr(torch, precision))


def token_chunks(tokenizer: Any, text: str, size: int, overlap: int) -> list[str]:
    """Split a text into chunks of at most ``size`` tokens; consecutive chunks share ``overlap`` tokens.

    The chunks are substrings of the text.

    Raises:
        RetrievalError: The overlap is not smaller than the size.
    """
    if not 0 <= overlap < size:
        raise RetrievalError(f"chunks of {size} tokens cannot overlap by {overlap}")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return split_by_spans(text, encoding["offset_mapping"], size, overlap)


def split_by_spans(text: str, spans: Sequence[tuple[int, int]], size: int, overlap: int) -> list[str]:
    """Split a text into chunks of at most ``size`` spans (begin and end of each token), sharing ``overlap`` spans."""
    if len(spans) <= size:
        return [text]
    begins = range(0, max(len(spans) - overlap, 1), size - overlap)
    return [text[spans[b][0] : spans[min(b + size, len(spans)) - 1][1]] for b in begins]


class LRUCache(Generic[T]):
    """Cache of the results for recently used texts."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._mutex = threading.Lock()

    def get(self, texts: Sequence[str], make: Callable[[list[str]], Sequence[T]]) -> list[T]:
        """Return the result for each text; ``make`` computes those that are not cached."""
        with self._mutex:
            results = {t: self._kept[t] for t in texts if t in self._kept}
        new = [t for t in dict.fromkeys(texts) if t not in results]
        if new:
            results.update(zip(new, make(new), strict=True))
        with self._mutex:
            self._kept.update(results)
            for text in results:
                self._kept.move_to_end(text)
            while len(self._kept) > REMEMBERED:
                self._kept.popitem(last=False)
        return [results[t] for t in texts]
