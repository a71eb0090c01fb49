"""The state file of Token Recycling: the adjacency table and acceptance rates that all requests share."""

import contextlib
import glob
import json
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pilotfish._internal.atomic_write import open_atomic

from ..config import ConfigError
from ..contracts import Engine
from . import adjacency_table
from .adjacency_table import AcceptanceRates, AdjacencyTable

FORMAT = 1
REMEDY = "remove the file, or name another one in state_path"


class TableOptions(Protocol):
    """The options that determine the shape of a table."""

    @property
    def k(self) -> int: ...
    @property
    def order(self) -> int: ...
    @property
    def bits(self) -> int: ...


def write_state(
    path: Path, options: TableOptions, engine: Engine, rows: AdjacencyTable, acceptance: AcceptanceRates
) -> None:
    """Write a table atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    arrays = {**rows._asdict(), **acceptance._asdict()}
    with open_atomic(path) as file:
        np.savez(file, allow_pickle=False, meta=json.dumps(_meta(options, engine)), **arrays)


def read_state(path: Path, options: TableOptions, engine: Engine) -> tuple[AdjacencyTable, AcceptanceRates]:
    """Read the table that `write_state` wrote.

    Raises:
        ConfigError: The file is damaged, or has another vocabulary, shape or format.
    """
    where = f"pilotfish.drafter.state_path: {path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = dict(json.loads(str(arrays.pop("meta"))))
    except Exception as error:  # zipfile, numpy and json each have their own; all mean the same here
        raise ConfigError(f"{where}: not a readable state file ({error}); {REMEDY}") from None
    for key, expected in _meta(options, engine).items():
        if meta.get(key) != expected:
            raise ConfigError(f"{where}: written with {key}={meta.get(key)}, this engine has {expected}; {REMEDY}")
    rows = adjacency_table.make_adjacency_table(engine.vocab_size, options.k, options.order, options.bits)
    acceptance = adjacency_table.make_acceptance_rates(options.order, options.k)
    for field, expected in {**rows._asdict(), **acceptance._asdict()}.items():
        array = arrays.get(field)
        if array is None or array.shape != expected.shape or array.dtype != expected.dtype:
            raise ConfigError(f"{where}: damaged, {field} is missing or of another shape; {REMEDY}")
    # Compiled code checks no bounds: what it will use as an index is checked here.
    tokens, confidence = arrays["tokens"], arrays["confidence"]
    sound = tokens.min() >= adjacency_table.NONE and tokens.max() < engine.vocab_size
    seen, right, rate = arrays["seen"], arrays["right"], arrays["rate"]
    sound = sound and bool(((seen > 0) & (right >= 0) & (right <= seen) & (rate >= 0) & (rate <= 1)).all())
    if not sound or confidence.max() >= adjacency_table.NUM_CONFIDENCES:
        raise ConfigError(f"{where}: damaged, it holds values out of range; {REMEDY}")
    return AdjacencyTable(tokens, confidence, arrays["keys"]), AcceptanceRates(seen, right, rate)


def _meta(options: TableOptions, engine: Engine) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "vocab_size": engine.vocab_size,
        "k": options.k,
        "order": options.order,
        "bits": options.bits,
    }


def _remove_leftovers(path: Path, age: float = 60.0) -> None:
    """Remove temporary files next to ``path`` of writers that were killed more than ``age`` seconds ago."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - leftover.stat().st_mtime > age:
                leftover.unlink()
