"""Centroids of token vectors, and the assignment of tokens to inverted lists.

Token-aware clustering: the vectors of a vocabulary entry are close to each other, so k-means runs separately over the
vectors of each frequent entry. Rare entries share clusters. This is about fifty times faster than k-means over all
vectors, at equal search quality.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST, MOST = 16, 1 << 18  # limits of the number of lists
POINTS = 64  # maximum number of training vectors per centroid
ROUNDS = 4  # iterations of k-means
ROWS = 1 << 14  # vectors compared with the centroids at once
FLAT = 32_768  # with more centroids, the nearest one is found through an HNSW graph


def default_num_lists(tokens: int) -> int:
    """Return the default nlist for a number of tokens: four times its square root, as is usual for IVF indexes."""
    return int(np.clip(4 * np.sqrt(tokens), LEAST, MOST))


@dataclass(frozen=True)
class Clusters:
    """Centroids of the inverted lists.

    Attributes:
        centroids: [lists, dimension] float32 centroids.
        owners: [lists] int32 vocabulary entry of each centroid, ascending; -1 for shared centroids, which come last.
    """

    centroids: NDArray[np.float32]
    owners: NDArray[np.int32]

    def assign(self, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the list of each vector, [n] int32.

        It is the nearest one among those of the vector's vocabulary entry, or else among the shared ones.
        """
        assigned = np.empty(len(ids), np.int32)
        order = np.argsort(ids, kind="stable")
        entries, starts = np.unique(ids[order], return_index=True)
        begins = np.searchsorted(self.owners[: self._owned], entries, "left")
        ends = np.searchsorted(self.owners[: self._owned], entries, "right")
        rest = []
        for begin, end, rows in zip(begins, ends, np.split(order, starts[1:]), strict=True):
            if end - begin == 1:
                assigned[rows] = begin
            elif end > begin:
                assigned[rows] = begin + nearest_centroids(vectors[rows], self.centroids[begin:end])
            else:
                rest.append(rows)
        if rest:
            rows = np.concatenate(rest)
            shared = self.centroids[self._owned :]
            low = self._owned if len(shared) else 0
            assigned[rows] = low + nearest_centroids(vectors[rows], shared if len(shared) else self.centroids)
        return assigned

    @property
    def _owned(self) -> int:
        return int((self.owners >= 0).sum())


def train_centroids(vectors: NDArray[np.float32], ids: NDArray[np.int32] | None, lists: int, seed: int = 0) -> Clusters:
    """Train the centroids.

    Args:
        vectors: [n, dimension] sample of token vectors.
        ids: [n] vocabulary entries of the vectors; None for k-means over all vectors.
        lists: Approximate number of lists.
        seed: Random seed.
    """
    if ids is None:
        centroids = kmeans(vectors, lists, seed)
        return Clusters(centroids, np.full(len(centroids), -1, np.int32))
    tokens_per_list = len(ids) / lists
    order = np.argsort(ids, kind="stable")
    entries, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    parts, owners, rest = [], [], []
    for entry, rows, count in zip(entries, np.split(order, starts[1:]), counts, strict=True):
        if count < tokens_per_list / 2:
            rest.append(rows)
            continue
        centroids_of_entry = kmeans(vectors[rows], max(1, round(count / tokens_per_list)), seed)
        parts.append(centroids_of_entry)
        owners += [int(entry)] * len(centroids_of_entry)
    if rest:
        rows = np.concatenate(rest)
        parts.append(kmeans(vectors[rows], max(1, round(len(rows) / tokens_per_list)), seed))
        owners += [-1] * len(parts[-1])
    return Clusters(np.concatenate(parts), np.array(owners, np.int32))


def kmeans(vectors: NDArray[np.float32], k: int, seed: int = 0) -> NDArray[np.float32]:
    """Run k-means and return the centroids, [at most k, dimension]."""
    k = min(k, len(vectors))
    if k == 1:
        return vectors.mean(0, keepdims=True, dtype=np.float32)
    import faiss

    runner = faiss.Kmeans(
        vectors.shape[1],
        k,
        niter=ROUNDS,
        seed=seed,
        max_points_per_centroid=POINTS,
        min_points_per_centroid=1,
        gpu=gpus() > 0,
    )
    runner.train(np.ascontiguousarray(vectors, np.float32))
    # Equal vectors give equal centroids; all but one of them would stay empty.
    return runner.centroids[np.sort(np.unique(runner.centroids.round(4), axis=0, return_index=True)[1])]


def gpus() -> int:
    """Return the number of GPUs that FAISS can use; 0 with faiss-cpu."""
    import faiss

    return faiss.get_num_gpus()


def nearest_centroids(vectors: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the index of the nearest centroid of each vector, [n]."""
    import faiss

    if len(centroids) > 1 and gpus():
        flat = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(centroids.shape[1]))
        flat.add(centroids)
        return flat.search(np.ascontiguousarray(vectors, np.float32), 1)[1][:, 0].astype(np.int32)
    if len(centroids) > FLAT:
        graph = faiss.IndexHNSWFlat(centroids.shape[1], 32)
        graph.add(centroids)
        return graph.search(np.ascontiguousarray(vectors, np.float32), 1)[1][:, 0].astype(np.int32)
    nearest, half = np.empty(len(vectors), np.int32), 0.5 * (centroids**2).sum(1)
    for begin in range(0, len(vectors), ROWS):
        part = vectors[begin : begin + ROWS] @ centroids.T
        nearest[begin : begin + ROWS] = (part - half).argmax(1)
    return nearest
