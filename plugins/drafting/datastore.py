"""A corpus of token ids on disk, in which a drafter looks up continuations.

A datastore is a folder of three files: ``tokens.npy`` int32 [n], the concatenated texts; ``order.npy`` uint32 [n],
their suffix array; and ``datastore.json``, a description of both. The arrays are memory-mapped: engines on one machine
share them, and only the parts in use are read.
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
    """Error for a folder that is not a datastore, or for a damaged datastore."""


@dataclass(frozen=True)
class DatastoreInfo:
    """The description of a datastore.

    Attributes:
        tokenizer: Name of the tokenizer, for information only.
        fingerprint: Fingerprint of the tokenizer, see `vocabulary_fingerprint`; the token ids are valid for this
            tokenizer only.
        texts: Number of texts.
        tokens: Number of tokens, breaks between texts included.
        largest: Largest token id.
        depth: Number of tokens by which the suffixes are ordered.
        digests: SHA-256 of the arrays' files, by file name.
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
        """Open a datastore.

        Args:
            folder: Folder that `build_datastore` wrote.
            verify: Whether to read all files and compare their checksums.

        Raises:
            DatastoreError: The folder is not a datastore, has another format version, or is damaged.
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
            raise DatastoreError(f"{folder}: of version {version}, expected {FORMAT}; build it again")
        self.tokens, self.order = self._map(TOKENS, np.int32), self._map(ORDER, np.uint32)
        if verify:
            self.verify()

    def _map(self, name: str, dtype: type) -> NDArray:
        try:
            array = np.load(self.folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DatastoreError(f"{self.folder}: {name} cannot be read ({error})") from None
        if array.dtype != dtype or array.shape != (self.info.tokens,):
            raise DatastoreError(f"{self.folder}: {name} has unexpected contents, {array.dtype} {array.shape}")
        return np.asarray(array)

    def verify(self) -> None:
        """Compare the checksums of all files.

        Raises:
            DatastoreError: A checksum differs.
        """
        for name, expected in self.info.digests.items():
            if file_sha256(self.folder / name) != expected:
                raise DatastoreError(f"{self.folder}: {name} is damaged; build it again")

    @cached_property
    def _search(self):
        from . import suffix_search  # compiled with numba, which must not be imported early

        return suffix_search

    def find_longest_suffix(
        self, tail: NDArray[np.int32], longest: int = SUFFIX_DEPTH, shortest: int = 2
    ) -> SuffixMatch:
        """Find the longest suffix of ``tail`` [t] that occurs; see `suffix_search.find_longest_suffix`."""
        return self._search.find_longest_suffix(self.tokens, self.order, tail, longest, shortest)

    def continuations(self, match: SuffixMatch, width: int, most: int) -> NDArray[np.int32]:
        """Return the tokens after a match, [at most ``most``, width]; see `suffix_search.continuations`."""
        return self._search.continuations(self.tokens, self.order, match, width, most)


def build_datastore(
    folder: Path, texts: Iterable[list[int]], tokenizer: str, fingerprint: str, most: int
) -> DatastoreInfo:
    """Write a datastore atomically; an existing datastore in the same folder is replaced.

    Args:
        folder: Folder of the datastore.
        texts: Token ids of each text; texts are read until there are ``most`` tokens.
        tokenizer: Name of the tokenizer.
        fingerprint: Fingerprint of the tokenizer, see `vocabulary_fingerprint`.
        most: Largest number of tokens; sorting takes about 40 bytes of memory per token.

    Raises:
        DatastoreError: The texts contain no tokens, or the folder contains something else than a datastore.
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
    """Return a hex digest of a tokenizer's vocabulary, which decides the meaning of token ids."""
    return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def check_datastore_path(folder: Path) -> None:
    """Check that a datastore can be written to a folder.

    Raises:
        DatastoreError: The folder contains something else than a datastore, or its parent is not a folder.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / ABOUT).is_file() and is_occupied(folder)):
        raise DatastoreError(f"{folder}: exists, and is no datastore")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise DatastoreError(f"{folder}: {parent} is not a folder")


def is_occupied(folder: Path) -> bool:
    """Return whether a path is a file, or a folder that is not empty."""
    return not folder.is_dir() or any(folder.iterdir())
