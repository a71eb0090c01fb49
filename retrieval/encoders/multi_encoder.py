"""Several encoders as one, for hybrid indexes; shared encoders run once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tokenization import Progress


@dataclass(frozen=True)
class MultiEncoded:
    """Encodings of the same texts by several encoders, by name."""

    parts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, text: int) -> "MultiEncoded":
        """Return the encodings of one text."""
        return MultiEncoded({name: part[text] for name, part in self.parts.items()})


class MultiEncoder:
    """Encoder that combines several encoders, by name."""

    def __init__(self, encoders: Mapping[str, Any]) -> None:
        self.encoders = encoders
        self.name = ",".join(f"{name}={encoder.name}" for name, encoder in encoders.items())
        self.dimension = sum(encoder.dimension for encoder in encoders.values())

    @property
    def fingerprint(self) -> str:
        """Fingerprint of all encoders together."""
        fingerprints = " ".join(f"{name} {encoder.fingerprint}" for name, encoder in self.encoders.items())
        return hashlib.sha256(fingerprints.encode()).hexdigest()[:16]

    def encode_documents(self, documents: Sequence[str], progress: Progress | None = None) -> MultiEncoded:
        """Encode documents with each encoder.

        ``progress`` is passed to the first encoder, which is usually the most expensive one.
        """
        encoded: dict[int, Any] = {}
        for i, encoder in enumerate(self.encoders.values()):
            if id(encoder) not in encoded:
                encoded[id(encoder)] = encoder.encode_documents(documents, progress if i == 0 else None)
        return MultiEncoded({name: encoded[id(encoder)] for name, encoder in self.encoders.items()})

    def encode_queries(self, queries: Sequence[str]) -> MultiEncoded:
        """Encode queries with each encoder."""
        return MultiEncoded({name: encoder.encode_queries(queries) for name, encoder in self.encoders.items()})

    def chunks(self, text: str, size: int, overlap: int) -> list[str]:
        """Split a text into chunks of ``size`` tokens of the first encoder."""
        return next(iter(self.encoders.values())).chunks(text, size, overlap)
