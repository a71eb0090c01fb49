"""Codecs of token residuals (vector minus centroid).

| codec | bytes for 128 dimensions | encoding |
|---|---|---|
| `float16` | 256 | half precision |
| `sq8` | 128 | scalar quantiser, 8 bits per dimension, linear between lower and upper bound |
| `sq4` | 64 | scalar quantiser, 4 bits per dimension; two per byte, the even dimension in the low bits |
| `pq` | 32 | product quantiser of FAISS, one byte for four dimensions |
| `rabitq` | 18 | signs after a random rotation, and one factor that makes the estimate unbiased (arXiv 2405.12497) |
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray]
SAMPLE = 65_536  # maximum number of residuals in the training sample
CUT = 0.0005  # share of the residuals of a dimension that is clipped at each end


class Codec(ABC):
    """Stateless codec between residuals [n, dimension] float32 and codes [n, size] uint8."""

    name: ClassVar[str]
    kernel: ClassVar[int]  # number of the code format in the kernel, see `CodecArrays`
    rotates: ClassVar[bool] = False  # whether vectors need a random rotation first

    @abstractmethod
    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Train the arrays that `encode` and `decode` need."""

    @abstractmethod
    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode residuals to codes, [n, size]."""

    @abstractmethod
    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decode codes to approximate residuals, [n, dimension]."""

    @abstractmethod
    def size(self, dimension: int) -> int:
        """Return the number of bytes per code."""


class Scalar(Codec):
    """Scalar quantiser: each dimension separately, linear between bounds."""

    bits: ClassVar[int]

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Compute lower bound and step of each dimension."""
        low, high = np.quantile(residuals, (CUT, 1 - CUT), axis=0).astype(np.float32)
        step = (high - low) / ((1 << self.bits) - 1)
        return {"low": low, "step": step.astype(np.float32)}

    def levels(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Quantise residuals to levels, [n, dimension]."""
        step = np.where(arrays["step"] > 0, arrays["step"], 1)
        return np.clip(np.rint((residuals - arrays["low"]) / step), 0, (1 << self.bits) - 1).astype(np.uint8)

    def value(self, arrays: Arrays, levels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the values of levels, [n, dimension]."""
        return arrays["low"] + levels.astype(np.float32) * arrays["step"]


class SQ8(Scalar):
    """Scalar quantiser with 8 bits per dimension."""

    name, kernel, bits = "sq8", 1, 8

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode residuals as their levels."""
        return self.levels(arrays, residuals)

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decode levels."""
        return self.value(arrays, codes)

    def size(self, dimension: int) -> int:
        """Return one byte per dimension."""
        return dimension


class SQ4(Scalar):
    """Scalar quantiser with 4 bits per dimension."""

    name, kernel, bits = "sq4", 0, 4

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pack two levels into a byte, the even dimension into the low bits."""
        levels = self.levels(arrays, residuals)
        return levels[:, 0::2] | (levels[:, 1::2] << np.uint8(4))

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Unpack the levels and decode them."""
        levels = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], -1)
        return self.value(arrays, levels.reshape(len(codes), 2 * codes.shape[1]))

    def size(self, dimension: int) -> int:
        """Return half a byte per dimension."""
        return dimension // 2


class Float16(Codec):
    """Half-precision floats."""

    name, kernel = "float16", 2

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Return no arrays: the codec needs no training."""
        return {}

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Round residuals to float16."""
        return np.ascontiguousarray(residuals, np.float16).view(np.uint8)

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Convert float16 to float32."""
        return np.ascontiguousarray(codes).view(np.float16).astype(np.float32)

    def size(self, dimension: int) -> int:
        """Return two bytes per dimension."""
        return 2 * dimension


class PQ(Codec):
    """Product quantiser of FAISS: each group of four dimensions is encoded as one of 256 centroids."""

    name, kernel = "pq", 3
    group: ClassVar[int] = 4

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Train the centroids of each group, [groups, 256, 4]."""
        import faiss

        quantiser = faiss.ProductQuantizer(residuals.shape[1], residuals.shape[1] // self.group, 8)
        quantiser.cp.min_points_per_centroid = 1
        repeats = -(-256 // len(residuals))  # k-means needs at least one point per centroid
        quantiser.train(np.ascontiguousarray(np.tile(residuals, (repeats, 1)), np.float32))
        return {"codebooks": faiss.vector_to_array(quantiser.centroids).reshape(quantiser.M, 256, self.group).copy()}

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode each group as its nearest centroid."""
        import faiss

        groups = len(arrays["codebooks"])
        quantiser = faiss.ProductQuantizer(groups * self.group, groups, 8)
        faiss.copy_array_to_vector(np.ascontiguousarray(arrays["codebooks"]).ravel(), quantiser.centroids)
        return quantiser.compute_codes(np.ascontiguousarray(residuals, np.float32))

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Concatenate the centroids of the groups."""
        groups = np.arange(codes.shape[1])
        return arrays["codebooks"][groups, codes].reshape(len(codes), self.group * codes.shape[1])

    def size(self, dimension: int) -> int:
        """Return one byte per group."""
        return dimension // self.group


class RaBitQ(Codec):
    """RaBitQ (arXiv 2405.12497): the sign of each dimension, and one factor.

    The factor |r|^2 / |r|_1 makes the estimated inner product with a query unbiased.
    """

    name, kernel, rotates = "rabitq", 3, True

    def train(self, residuals: NDArray[np.float32]) -> dict[str, NDArray]:
        """Return the eight signs of each byte as codebooks, [groups, 256, 8], for the kernel that also reads `pq`."""
        signs = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * 2.0 - 1
        return {"codebooks": np.tile(signs.astype(np.float32), (residuals.shape[1] // 8, 1, 1))}

    def encode(self, arrays: Arrays, residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode residuals as packed signs, followed by the factor as float16."""
        total = np.abs(residuals).sum(1)
        factor = (residuals**2).sum(1) / np.where(total > 0, total, 1)
        bits = np.packbits(residuals > 0, axis=1, bitorder="little")
        return np.concatenate([bits, factor.astype(np.float16)[:, None].view(np.uint8)], 1)

    def decode(self, arrays: Arrays, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Multiply the signs by the factor."""
        signs = np.unpackbits(codes[:, :-2], axis=1, bitorder="little") * 2.0 - 1
        return (signs * np.ascontiguousarray(codes[:, -2:]).view(np.float16)).astype(np.float32)

    def size(self, dimension: int) -> int:
        """Return one bit per dimension and two bytes for the factor."""
        return dimension // 8 + 2


CODECS: dict[str, Codec] = {codec.name: codec for codec in (SQ4(), SQ8(), Float16(), PQ(), RaBitQ())}
