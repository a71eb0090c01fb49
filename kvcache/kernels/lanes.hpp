// Vector types, number types, and the inner loops of attention: query-key products of a group of transposed keys,
// softmax weights, and weighted sums of values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int GROUP = 32;  // tokens in a page, see `selection.PAGE_SIZE`; one cache line of 16-bit keys
constexpr int HEADS = 4;   // query heads whose sums stay in registers
constexpr float LOWEST = -1e30f;

// As wide as the processor's registers: compilers spill wider vectors to memory, which is ten times slower.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PAIR = 2 * LANES;  // step of the inner loops
static_assert(GROUP % PAIR == 0, "groups are whole pairs of vectors");

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

struct BFloat16 { uint16_t bits; };
struct Float16 { _Float16 value; };

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }

inline Vec load(const BFloat16* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, UintVec) << 16);
}

inline Vec load(const Float16* p) {
    Vec v;
    for (int i = 0; i < LANES; ++i) v[i] = (float)p[i].value;
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { uint32_t u = (uint32_t)x.bits << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline float widen(Float16 x) { return (float)x.value; }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, Float16* to) { to->value = (_Float16)x; }
inline void narrow(float x, BFloat16* to) {  // round to nearest even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    to->bits = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// e^x for x <= 0, relative error below 2e-7: 2^n * p(r), with |r| <= ln(2) / 2.
inline Vec exponential(Vec x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number in the low bits
    const Vec n = shifted - 12582912.0f;
    const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
    return p * (Vec)power;
}

inline float sum(Vec v) { float s = 0; for (int i = 0; i < LANES; ++i) s += v[i]; return s; }

// Return the maximum of x[0..n). Up to LANES - 1 values after x[n - 1] are overwritten with LOWEST.
inline float greatest(float* x, int64_t n) {
    for (int64_t i = n; i % LANES; ++i) x[i] = LOWEST;
    Vec top = splat(LOWEST);
    for (int64_t i = 0; i < n; i += LANES) {
        const Vec v = load(x + i);
        top = v > top ? v : top;
    }
    float result = LOWEST;
    for (int i = 0; i < LANES; ++i) result = std::max(result, top[i]);
    return result;
}

// Replace x[0..n) by e^(x - top), where top is its maximum, and return the sum. `greatest` must have padded x.
inline float exponentials(float* x, int64_t n, float top) {
    Vec total{};
    for (int64_t i = 0; i < n; i += LANES) {
        const Vec e = exponential(load(x + i) - top);
        store(x + i, e);
        total += e;
    }
    return sum(total);
}

// Compute logits[h][0..GROUP) of M query heads with one group of transposed keys.
template <int M, typename T>
inline void score(const float* q, int head_size, const T* keys, int64_t row_stride, float* logits, int64_t out_stride) {
    for (int part = 0; part < GROUP; part += PAIR) {
        Vec low[M], high[M];
        for (int h = 0; h < M; ++h) low[h] = high[h] = Vec{};
        const T* row = keys + part;
        for (int d = 0; d < head_size; ++d, row += row_stride) {
            const Vec a = load(row), b = load(row + LANES);
            for (int h = 0; h < M; ++h) {
                const Vec x = splat(q[h * head_size + d]);
                low[h] += x * a;
                high[h] += x * b;
            }
        }
        for (int h = 0; h < M; ++h) {
            store(logits + h * out_stride + part, low[h]);
            store(logits + h * out_stride + part + LANES, high[h]);
        }
    }
}

// Compute sums[h] = weights[h] @ values for M query heads over n positions; BLOCK vectors of the head at a time.
template <int M, int BLOCK, typename T>
inline void mix(const float* weights, int64_t weight_stride, const T* const* values, int n, int head_size, float* sums) {
    for (int d = 0; d < head_size; d += BLOCK * LANES) {
        Vec total[M][BLOCK];
        for (int h = 0; h < M; ++h)
            for (int b = 0; b < BLOCK; ++b) total[h][b] = Vec{};
        for (int i = 0; i < n; ++i) {
            Vec v[BLOCK];
            for (int b = 0; b < BLOCK; ++b) v[b] = load(values[i] + d + b * LANES);
            for (int h = 0; h < M; ++h) {
                const Vec w = splat(weights[h * weight_stride + i]);
                for (int b = 0; b < BLOCK; ++b) total[h][b] += w * v[b];
            }
        }
        for (int h = 0; h < M; ++h)
            for (int b = 0; b < BLOCK; ++b) store(sums + h * head_size + d + b * LANES, total[h][b]);
    }
}

template <int M, typename T>
inline void mix(const float* w, int64_t stride, const T* const* values, int n, int head_size, float* sums) {
    if (LANES == 16 && head_size % (4 * LANES) == 0) mix<M, 4>(w, stride, values, n, head_size, sums);
    else if (head_size % (2 * LANES) == 0) mix<M, 2>(w, stride, values, n, head_size, sums);
    else mix<M, 1>(w, stride, values, n, head_size, sums);
}

}  // namespace
