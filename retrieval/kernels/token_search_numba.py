"""The algorithm of `token_search.cpp` in numba, for machines without a C++ compiler."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal.jit import jit


@jit
def _values(codes, kernel, low, step, codebooks, factored, query, base, out):
    """Compute the similarities of one query token and the codes of a list."""
    d = query.shape[0]
    small, scale = np.zeros(d, np.int32), np.float32(0)
    if kernel <= 1:  # the rounding of `prepare` in the C++ kernel, so that the scores are the same
        largest, offset = np.float32(1e-12), np.float32(0)
        for j in range(d):
            offset += query[j] * low[j]
            largest = max(largest, abs(query[j] * step[j]))
        base, scale = np.float32(offset + base), largest / np.float32(127)
        factor = np.float32(127) / largest
        for j in range(d):
            small[j] = np.int32(np.rint(query[j] * step[j] * factor))
    for i in range(codes.shape[0]):
        if kernel <= 1:
            product = np.int32(0)
            if kernel == 0:
                for j in range(d // 2):
                    product += small[2 * j] * np.int32(codes[i, j] & 15)
                    product += small[2 * j + 1] * np.int32(codes[i, j] >> 4)
            else:
                for j in range(d):
                    product += small[j] * np.int32(codes[i, j])
            out[i] = base + scale * np.float32(product)
            continue
        total = np.float32(0)
        if kernel == 2:
            for j in range(d):
                total += query[j] * _half(codes[i, 2 * j], codes[i, 2 * j + 1])
        else:
            size = codebooks.shape[2]
            for g in range(codebooks.shape[0]):
                for j in range(size):
                    total += query[g * size + j] * codebooks[g, codes[i, g], j]
            if factored:
                total *= _half(codes[i, codebooks.shape[0]], codes[i, codebooks.shape[0] + 1])
        out[i] = base + total


@jit
def _half(low, high):
    """Decode a float16 from its two bytes."""
    bits = np.int64(low) | (np.int64(high) << 8)
    sign = np.float32(-1.0) if bits & 0x8000 else np.float32(1.0)
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    if exponent == 0:
        return sign * np.float32(fraction * 2.0**-24)
    return sign * np.float32((1024 + fraction) * 2.0 ** (exponent - 25))


@jit
def _collect(starts, rows, codes, lists, coded, query, near, documents, scores, at):
    """Append the documents and similarities of the lists of one segment; return the new length."""
    kernel, low, step, codebooks, factored = coded
    for i in lists:
        begin, end = starts[i], starts[i + 1]
        _values(codes[begin:end], kernel, low, step, codebooks, factored, query, near[i], scores[at : at + end - begin])
        documents[at : at + end - begin] = rows[begin:end]
        at += end - begin
    return at


@jit
def _take(documents, scores, least, keep, allow, missing, best, sums, now, seen, query):
    """Add the largest similarity of each document to its sum."""
    count = 0
    found = np.empty(len(documents), np.int32)
    for i in range(len(documents)):
        document, value = documents[i], scores[i]
        if (value < least and not keep) or (len(allow) and not (allow[document >> 3] >> (document & 7)) & 1):
            continue
        value = max(value, least)
        if now[document] != query:
            now[document], best[document] = query, value
            found[count] = document
            count += 1
        elif value > best[document]:
            best[document] = value
    for document in found[:count]:
        seen[document] = True
        sums[document] += best[document] - missing


def search_tokens(
    segments: tuple,
    sizes: NDArray[np.int64],
    coded: tuple,
    query: NDArray[np.float32],
    near: NDArray[np.float32],
    settings: tuple[int, int, int, int, int, bool],
    allow: NDArray[np.uint8],
    count: int,
    documents: NDArray[np.int32],
    scores: NDArray[np.float32],
    traced: int,
    trace: NDArray[np.float32],
    imputed: NDArray[np.float32],
) -> int:
    """Search as `token_search.cpp` does, and return the number of documents found."""
    nprobe, impute, t_prime, bound, kth, keep = settings
    lists = len(near)
    nprobe = min(nprobe, lists)
    best, sums = np.zeros(count, np.float32), np.zeros(count, np.float32)
    now, seen = np.full(count, -1, np.int32), np.zeros(count, np.bool_)
    total = 0.0
    for t in range(len(query)):
        order = _nearest(near[:, t], min(max(bound, nprobe), lists) if impute == 1 else nprobe)
        probed = order[:nprobe]
        capacity = int(sizes[probed].sum())
        rows, values, at = np.empty(capacity, np.int32), np.empty(capacity, np.float32), 0
        for starts, numbers, codes in segments:
            at = _collect(starts, numbers, codes, probed, coded, query[t], near[:, t], rows, values, at)
        rows, values = rows[:at], values[:at]
        missing: Any = np.float32(0)
        if impute == 1 and len(order):
            passed = np.flatnonzero(np.cumsum(sizes[order]) >= t_prime)
            missing = near[order[passed[0] if len(passed) else -1], t]
        elif impute == 2:
            eligible = values
            if len(allow):
                eligible = values[(allow[rows >> 3] >> (rows & 7)) & 1 == 1]
            if len(eligible):
                missing = np.partition(eligible, -kth)[-kth] if len(eligible) > kth else eligible.min()
        least = np.float32(-np.inf) if impute == 0 else missing
        _take(rows, values, least, keep, allow, missing, best, sums, now, seen, t)
        total += float(missing)
        if traced >= 0:
            trace[t] = best[traced] if now[traced] == t else np.nan
            imputed[t] = missing
    found = np.flatnonzero(seen)
    means = (sums[found] + np.float32(total)) / np.float32(max(len(query), 1))
    order = np.lexsort((found, -means))[: len(documents)]
    found = found[order]
    documents[: len(found)], scores[: len(found)] = found, means[order]
    return len(found)


def _nearest(near: NDArray[np.float32], wanted: int) -> NDArray[np.int64]:
    """Return the ``wanted`` nearest lists, best first."""
    part = np.argpartition(-near, wanted - 1)[:wanted] if wanted < len(near) else np.arange(len(near))
    return part[np.lexsort((-part, -near[part]))]
