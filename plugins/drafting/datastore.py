"""A corpus of token ids on disk, in which a drafter looks up how a text went on elsewhere.

A datastore is a folder of three files: ``tokens.npy`` int32 [n], texts one behind the other; ``order.npy`` uint32 [n],
its suffix array; ``datastore.json``, what they are. Both arrays are mapped into memory: engines on one machine share
them, and only what is looked at is read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.atomic_write import file_sha256, replace_folder, temporary_folder_beside

from . import suffix_array
from .suffix_array import SUFFIX_DEPTH, TEXT_BREAK, SuffixMatch

FORMAT = 2
ABOUT, TOKENS, ORDER = "datastore.json", "tokens.npy", "order.npy"


class DatastoreError(ValueError):
    """A folder that is no datastore, or a damaged one."""


@dataclass(frozen=True)
class DatastoreInfo:
    """What a datastore holds.

    Attributes:
        tokenizer: Name of the tokenizer, for people.
        fingerprint: Of the tokenizer; token ids mean nothing to another one.
        texts: How many texts.
        tokens: How many tokens, breaks between texts included.
        largest: The largest token id.
        depth: Tokens by which the suffixes are ordered.
        digests: SHA-256 of the arrays' files, by name.
    """

    tokenizer: str
    fingerprint: str
    texts: int
    tokens: int
    largest: int
    depth: int
    digests: dict[str, str]


class Datastore:
    """An opened datastore."""

    def __init__(self, folder: Path, verify: bool = False) -> None:
        """Map a datastore into memory.

        Args:
            folder: That `build` wrote.
            verify: Read all of it, and compare checksums.

        Raises:
            DatastoreError: it is none, of another version, or damaged.
        """
        self.folder = folder
        try:
            value = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            version = value.pop("format")
            self.info = DatastoreInfo(**value)
        except OSError as error:
            raise DatastoreError(f"{folder}: not a datastore ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DatastoreError(f"{folder}: {ABOUT} cannot be read") from None
        if version != FORMAT or self.info.depth != SUFFIX_DEPTH:
            raise DatastoreError(f"{folder}: of version {version}, expected {FORMAT}; build it anew")
        self.tokens, self.order = self._map(TOKENS, np.int32), self._map(ORDER, np.uint32)
        if verify:
            self.verify()

    def _map(self, name: str, dtype: type) -> NDArray:
        try:
            array = np.load(self.folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DatastoreError(f"{self.folder}: {name} cannot be read ({error})") from None
        if array.dtype != dtype or array.shape != (self.info.tokens,):
            raise DatastoreError(f"{self.folder}: {name} holds {array.dtype} {array.shape}")
        return np.asarray(array)

    def verify(self) -> None:
        """Compare checksums.

        Raises:
            DatastoreError: a file is not what was written.
        """
        for name, expected in self.info.digests.items():
            if file_sha256(self.folder / name) != expected:
                raise DatastoreError(f"{self.folder}: {name} is damaged; build it anew")

    @cached_property
    def _search(self):
        from . import suffix_search  # compiles

        return suffix_search

    def find_longest_suffix(
        self, tail: NDArray[np.int32], longest: int = SUFFIX_DEPTH, shortest: int = 2
    ) -> SuffixMatch:
        """Where the longest possible end of ``tail`` [t] occurs, see `suffix_search.find`."""
        return self._search.find_longest_suffix(self.tokens, self.order, tail, longest, shortest)

    def continuations(self, match: SuffixMatch, width: int, most: int) -> NDArray[np.int32]:
        """What followed there, [at most ``most``, width], see `suffix_search.followers`."""
        return self._search.continuations(self.tokens, self.order, match, width, most)


def build_datastore(
    folder: Path, texts: Iterable[list[int]], tokenizer: str, fingerprint: str, most: int
) -> DatastoreInfo:
    """Write a datastore, whole or not at all; an older one in its place is replaced.

    Args:
        folder: Where it goes.
        texts: Token ids of texts, taken until there are ``most``.
        tokenizer: Its name.
        fingerprint: See `About`.
        most: Tokens at most; sorting takes about 40 bytes of memory for each.

    Raises:
        DatastoreError: there is no token, or the folder holds something else.
    """
    check_datastore_path(folder)
    try:
        with temporary_folder_beside(folder) as partial:
            parts, count, room = [], 0, most
            for ids in filter(None, texts):
                part = np.asarray([*ids[: room - 1], TEXT_BREAK], np.int32)
                if room < 2:
                    break
                parts.append(part)
                count, room = count + 1, room - len(part)
            if not parts:
                raise DatastoreError("the texts contain no tokens")
            tokens = np.concatenate(parts)
            np.save(partial / TOKENS, tokens)
            np.save(partial / ORDER, suffix_array.build_suffix_array(tokens))
            digests = {name: file_sha256(partial / name) for name in (TOKENS, ORDER)}
            about = DatastoreInfo(tokenizer, fingerprint, count, len(tokens), int(tokens.max()), SUFFIX_DEPTH, digests)
            text = json.dumps({"format": FORMAT, **asdict(about)}, indent=1) + "\n"
            (partial / ABOUT).write_text(text, encoding="utf-8")
            replace_folder(partial, folder)
    except OSError as error:
        raise DatastoreError(f"{folder}: {error.strerror or error}") from None
    return about


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """Hex digest of a tokenizer's vocabulary: ids mean the same where it is the same."""
    return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def check_datastore_path(folder: Path) -> None:
    """Refuse a place that holds something else.

    Raises:
        DatastoreError: it does.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / ABOUT).is_file() and is_occupied(folder)):
        raise DatastoreError(f"{folder}: exists, and is no datastore")
    there = next(path for path in folder.absolute().parents if path.exists())
    if not there.is_dir():
        raise DatastoreError(f"{folder}: {there} is no folder")


def is_occupied(folder: Path) -> bool:
    """Whether a path is a file, or a folder that is not empty."""
    return not folder.is_dir() or any(folder.iterdir())
