"""How the residual of a token, its vector less its centroid, is kept: bytes, and what reads them.

| codec | bytes of 128 dimensions | what |
|---|---|---|
| `float16` | 256 | as it is |
| `sq8` | 128 | 8 bits a dimension, linear between its least and greatest |
| `sq4` | 64 | 4 bits a dimension, likewise; two in a byte, the even one low |
| `pq` | 32 | product quantiser of FAISS, one byte for four dimensions |
| `rabitq` | 18 | signs after a random rotation, and one factor that makes the estimate unbiased (arXiv 2405.12497) |
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray]
SAMPLE = 65_536  # residuals that a codec is trained with, at most
CUT = 0.0005  # of the residuals of a dimension, at each end, are clipped


class Codec(ABC):
    """Turns residuals [n, dimension] float32 into codes [n, size] uint8 and back; without state of its own."""

    name: ClassVar[str]
    kernel: ClassVar[int]  # how the kernel calls it
    rotates: ClassVar[bool] = False  # wants vectors in which no dimension is special

    @abstractmethod
    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """The arrays that `encode` and `decode` need."""

    @abstractmethod
    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes, [n, size]."""

    @abstractmethod
    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Residuals, about."""

    @abstractmethod
    def size(self, dimension: int) -> int:
        """Bytes of a code."""


class Scalar(Codec):
    """Each dimension by itself, linear between bounds."""

    bits: ClassVar[int]

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Bounds of each dimension."""
        low, high = np.quantile(residuals, (CUT, 1 - CUT), axis=0).astype(np.float32)
        step = (high - low) / ((1 << self.bits) - 1)
        return {"low": low, "step": step.astype(np.float32)}

    def levels(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """[n, dimension] the level of each value."""
        step = np.where(arrays["step"] > 0, arrays["step"], 1)
        return np.clip(np.rint((residuals - arrays["low"]) / step), 0, (1 << self.bits) - 1).astype(np.uint8)

    def value(self, arrays: Arrays, levels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What levels stand for."""
        return arrays["low"] + levels.astype(np.float32) * arrays["step"]


class SQ8(Scalar):
    """A byte for each dimension."""

    name, kernel, bits = "sq8", 1, 8

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """As they are."""
        return self.levels(arrays, residuals)

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As they are."""
        return self.value(arrays, codes)

    def size(self, dimension: int) -> int:
        """A byte for each."""
        return dimension


class SQ4(Scalar):
    """Half a byte for each dimension."""

    name, kernel, bits = "sq4", 0, 4

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Two in a byte, the even one low."""
        levels = self.levels(arrays, residuals)
        return levels[:, 0::2] | (levels[:, 1::2] << np.uint8(4))

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Apart again."""
        levels = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], -1)
        return self.value(arrays, levels.reshape(len(codes), 2 * codes.shape[1]))

    def size(self, dimension: int) -> int:
        """Half a byte for each."""
        return dimension // 2


class Float16(Codec):
    """Half precision."""

    name, kernel = "float16", 2

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Nothing to learn."""
        return {}

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rounded."""
        return np.ascontiguousarray(residuals, np.float16).view(np.uint8)

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As they are."""
        return np.ascontiguousarray(codes).view(np.float16).astype(np.float32)

    def size(self, dimension: int) -> int:
        """Two bytes for each."""
        return 2 * dimension


class PQ(Codec):
    """FAISS's product quantiser: groups of four dimensions, each by one of 256 centroids."""

    name, kernel = "pq", 3
    group: ClassVar[int] = 4

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Centroids of the groups, [groups, 256, 4]."""
        import faiss

        quantiser = faiss.ProductQuantizer(residuals.shape[1], residuals.shape[1] // self.group, 8)
        quantiser.cp.min_points_per_centroid = 1
        few = -(-256 // len(residuals))  # k-means wants a point for each centroid
        quantiser.train(np.ascontiguousarray(np.tile(residuals, (few, 1)), np.float32))
        return {"codebooks": faiss.vector_to_array(quantiser.centroids).reshape(quantiser.M, 256, self.group).copy()}

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The nearest centroid of each group."""
        import faiss

        groups = len(arrays["codebooks"])
        quantiser = faiss.ProductQuantizer(groups * self.group, groups, 8)
        faiss.copy_array_to_vector(np.ascontiguousarray(arrays["codebooks"]).ravel(), quantiser.centroids)
        return quantiser.compute_codes(np.ascontiguousarray(residuals, np.float32))

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Centroids one behind the other."""
        groups = np.arange(codes.shape[1])
        return arrays["codebooks"][groups, codes].reshape(len(codes), self.group * codes.shape[1])

    def size(self, dimension: int) -> int:
        """A byte for each group."""
        return dimension // self.group


class RaBitQ(Codec):
    """Signs; the factor |r|^2 / |r|_1 makes the expected product with a query the right one."""

    name, kernel, rotates = "rabitq", 3, True

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """What the eight signs of a byte stand for, [groups, 256, 8]: the kernel reads it as it reads `pq`."""
        signs = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * 2.0 - 1
        return {"codebooks": np.tile(signs.astype(np.float32), (residuals.shape[1] // 8, 1, 1))}

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Signs, then the factor as float16."""
        total = np.abs(residuals).sum(1)
        factor = (residuals**2).sum(1) / np.where(total > 0, total, 1)
        bits = np.packbits(residuals > 0, axis=1, bitorder="little")
        return np.concatenate([bits, factor.astype(np.float16)[:, None].view(np.uint8)], 1)

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Signs times the factor."""
        signs = np.unpackbits(codes[:, :-2], axis=1, bitorder="little") * 2.0 - 1
        return (signs * np.ascontiguousarray(codes[:, -2:]).view(np.float16)).astype(np.float32)

    def size(self, dimension: int) -> int:
        """A bit for each, and the factor."""
        return dimension // 8 + 2


CODECS: dict[str, Codec] = {codec.name: codec for codec in (SQ4(), SQ8(), Float16(), PQ(), RaBitQ())}
