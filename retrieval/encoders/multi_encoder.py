"""Several encoders as one, for indexes of several kinds; what two of them would do alike is done once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tokenization import Progress


@dataclass(frozen=True)
class MultiEncoded:
    """What each of several encoders makes of the same texts."""

    parts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, text: int) -> "MultiEncoded":
        """That of one text."""
        return MultiEncoded({name: part[text] for name, part in self.parts.items()})


class MultiEncoder:
    """Encoders by name."""

    def __init__(self, encoders: Mapping[str, Any]) -> None:
        self.encoders = encoders
        self.name = ",".join(f"{name}={encoder.name}" for name, encoder in encoders.items())
        self.dimension = sum(encoder.dimension for encoder in encoders.values())

    @property
    def fingerprint(self) -> str:
        """Of all of them."""
        told = " ".join(f"{name} {encoder.fingerprint}" for name, encoder in self.encoders.items())
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> MultiEncoded:
        """What documents are to each; ``progress`` is told of the first, which is as a rule the dearest."""
        done: dict[int, Any] = {}
        for i, encoder in enumerate(self.encoders.values()):
            if id(encoder) not in done:
                done[id(encoder)] = encoder.encode_documents(documents, progress if i == 0 else None)
        return MultiEncoded({name: done[id(encoder)] for name, encoder in self.encoders.items()})

    def encode_queries(self, queries: Sequence[str]) -> MultiEncoded:
        """What queries are to each."""
        return MultiEncoded({name: encoder.encode_queries(queries) for name, encoder in self.encoders.items()})

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Pieces of a text as the first encoder counts."""
        return next(iter(self.encoders.values())).chunks(text, size, overlap)
