// Attention of prompts, many query tokens of a request at a time, over the caches of `attend.hpp`.
//
// Work is divided into (tile, KV head): a tile is consecutive query tokens of a request, whose query heads share the
// keys and values that are read. Keys and values are processed CHUNK positions at a time. They are copied into cells,
// the operands of one multiply-add: one float, or two bfloat16 where the processor multiplies pairs. The softmax is
// online, in float32. Chunks begin at multiples of CHUNK whatever the tile, so the result of a token does not depend on
// how the scheduler split its prompt.
#pragma once

#include "attend.hpp"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#endif

extern "C" {

struct Prompts {  // spans of consecutive query tokens, each of one request
    int32_t count, query_heads;
    const int32_t* request;  // [count] row of the block table
    const int32_t* token;    // [count] row of the first token in query and output
    const int32_t* context;  // [count] number of tokens that the first token attends to, itself included
    const int32_t* length;   // [count] number of query tokens
    // If the tokens of a span are a tree: its attention mask as bits, [length, (length + 31) / 32]. Null for causal
    // attention.
    const uint32_t* seen;
    const int64_t* first_seen;  // [count] offset of each span's mask in ``seen``
};

}  // extern "C"

namespace {

constexpr int CHUNK = 128;
constexpr int GROUPS = CHUNK / GROUP;
constexpr int TILE = 96;  // rows: query tokens times num_queries_per_kv
#if defined(__AVX512F__)
constexpr int BAND = 12;  // rows whose scores stay in registers, 2 vectors each
#else
constexpr int BAND = 6;
#endif
static_assert(TILE % BAND == 0, "tiles are whole bands");

typedef uint32_t Cell;

// The operands of a multiply-add for a number type: DEEP numbers in a cell.
template <typename T>
struct Product {
    static constexpr int DEEP = 1;
    static Vec add(Vec to, Cell a, Vec b) {
        float x;
        std::memcpy(&x, &a, sizeof x);
        return to + splat(x) * b;
    }
    // Pack rows [DEEP][LANES] into cells.
    static Vec pack(const T* rows, int64_t stride) { (void)stride; return load(rows); }
    static void pack_left(const T* from, int n, Cell* to) {
        for (int i = 0; i < n; i += LANES) store((float*)to + i, load(from + i));
    }
    static void pack_weights(const float* from, int n, Cell* to) { std::memcpy(to, from, n * sizeof(float)); }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <>
struct Product<BFloat16> {
    static constexpr int DEEP = 2;
    static Vec add(Vec to, Cell a, Vec b) {
        return (Vec)_mm512_dpbf16_ps((__m512)to, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
    }
    static Vec pack(const BFloat16* rows, int64_t stride) {
        Half a, b;
        std::memcpy(&a, rows, sizeof a);
        std::memcpy(&b, rows + stride, sizeof b);
        return (Vec)(__builtin_convertvector(a, UintVec) | __builtin_convertvector(b, UintVec) << 16);
    }
    static void pack_left(const BFloat16* from, int n, Cell* to) { std::memcpy(to, from, n * sizeof *from); }
    static void pack_weights(const float* from, int n, Cell* to) {
        for (int i = 0; i < n; i += LANES) {
            const __m256bh narrow = _mm512_cvtneps_pbh((__m512)load(from + i));
            std::memcpy(to + i / 2, &narrow, sizeof narrow);
        }
    }
};
#endif

// Copy a matrix [depth][width] into cells [depth / DEEP][width].
template <typename T>
inline void pack(const T* from, int64_t stride, int depth, int width, Cell* to) {
    constexpr int DEEP = Product<T>::DEEP;
    for (int k = 0; k < depth; k += DEEP, from += DEEP * stride, to += width)
        for (int i = 0; i < width; i += LANES) store((float*)to + i, Product<T>::pack(from + i, stride));
}

// Compute to[m] = to[m] * factor[m] + left[m] @ right for M rows and N vectors. A null factor counts as 0.
template <int M, int N, typename T>
inline void multiply(const Cell* left, int64_t left_stride, const Cell* right, int64_t right_stride, int steps, float* to,
                     int64_t to_stride, const float* factor) {
    Vec total[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            total[m][n] = factor ? load(to + m * to_stride + n * LANES) * factor[m] : Vec{};
    for (int s = 0; s < steps; ++s, right += right_stride) {
        Vec b[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) b[n] = load((const float*)right + n * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) total[m][n] = Product<T>::add(total[m][n], left[m * left_stride + s], b[n]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store(to + m * to_stride + n * LANES, total[m][n]);
}

// Compute sums[BAND][head_size] = sums * factor + weights @ values.
template <typename T>
inline void add_values(const Cell* weights, int64_t stride, const Cell* values, int steps, int head_size, float* sums,
                       const float* factor) {
    constexpr int HALF = BAND / 2;
    int d = 0;
    for (; LANES == 16 && d + 4 * LANES <= head_size; d += 4 * LANES)
        for (int m = 0; m < BAND; m += HALF)
            multiply<HALF, 4, T>(weights + m * stride, stride, values + d, head_size, steps, sums + m * head_size + d,
                                 head_size, factor + m);
    for (; d + 2 * LANES <= head_size; d += 2 * LANES)
        multiply<BAND, 2, T>(weights, stride, values + d, head_size, steps, sums + d, head_size, factor);
    for (; d < head_size; d += LANES)
        multiply<BAND, 1, T>(weights, stride, values + d, head_size, steps, sums + d, head_size, factor);
}

inline uint32_t first_bits(int n) { return n <= 0 ? 0 : n >= GROUP ? ~0u : (1u << n) - 1; }

// Return which of the GROUP tokens from ``at`` on a token of a tree attends to. The tree begins at 0, and its tokens
// attend to all tokens before it.
inline uint32_t seen_from(const uint32_t* bits, int words, int at) {
    if (at <= -GROUP) return ~0u;
    if (at < 0) return first_bits(-at) | bits[0] << -at;
    const int word = at / GROUP, shift = at % GROUP;
    uint32_t result = word < words ? bits[word] >> shift : 0;
    if (shift && word + 1 < words) result |= bits[word + 1] << (GROUP - shift);
    return result;
}

// Update the online softmax of one row with CHUNK scores, which become weights (0 if masked). seen: mask of each group.
inline void go_on(float* scores, const uint32_t* seen, float scale, float& top, float& total, float& factor) {
    UintVec bit;
    for (int i = 0; i < LANES; ++i) bit[i] = 1u << i;
    Vec most = splat(LOWEST);
    for (int i = 0; i < CHUNK; i += LANES) {
        const IntVec hidden = (IntVec)((UintVec{} + (seen[i / GROUP] >> i % GROUP) & bit) == 0);
        const Vec x = hidden ? splat(LOWEST) : load(scores + i) * scale;
        store(scores + i, x);
        most = x > most ? x : most;
    }
    float now = top;
    for (int i = 0; i < LANES; ++i) now = std::max(now, most[i]);
    Vec sums = Vec{};
    for (int i = 0; i < CHUNK; i += LANES) {
        const Vec x = load(scores + i);
        const Vec e = x > LOWEST ? exponential(x - now) : Vec{};
        store(scores + i, e);
        sums += e;
    }
    factor = exponential(splat(top - now))[0];
    total = total * factor + sum(sums);
    top = now;
}

struct Tile { int prompt, begin, count; };  // query tokens begin .. begin + count of a span

template <typename T>
void read_tile(const Cache& cache, const Prompts& prompts, const Window& window, float scale, const T* query,
               int64_t query_stride, T* output, int64_t output_stride, Tile tile, int kv_head, std::vector<Cell>& cells,
               std::vector<float>& numbers) {
    constexpr int DEEP = Product<T>::DEEP;
    const int head_size = cache.head_size, num_queries_per_kv = prompts.query_heads / cache.kv_heads;
    const int rows = tile.count * num_queries_per_kv;
    const int bands = (rows + BAND - 1) / BAND, request = prompts.request[tile.prompt];
    const int token = prompts.token[tile.prompt] + tile.begin, context = prompts.context[tile.prompt] + tile.begin;
    const Head& head = cache.heads[kv_head];
    const int* gaps = window.gaps && head.windowed ? window.gaps + token : nullptr;  // [tile.count]
    const int least = gaps ? *std::min_element(gaps, gaps + tile.count) : 0;
    const int length = prompts.length[tile.prompt], words = (length + GROUP - 1) / GROUP;
    const int before = prompts.context[tile.prompt] - 1;  // number of tokens before the span
    const uint32_t* tree = prompts.seen ? prompts.seen + prompts.first_seen[tile.prompt] : nullptr;
    const auto query_of = [&](int row) {
        return query + (token + row / num_queries_per_kv) * query_stride +
               (int64_t)(kv_head * num_queries_per_kv + row % num_queries_per_kv) * head_size;
    };

    cells.assign((size_t)(bands * BAND + CHUNK * 2) * head_size / DEEP + BAND * CHUNK / DEEP, 0);
    Cell* left = cells.data();                                     // [rows][head_size]
    Cell* keys = left + (size_t)bands * BAND * head_size / DEEP;   // GROUPS of [head_size][GROUP]
    Cell* values = keys + (size_t)CHUNK * head_size / DEEP;        // [CHUNK][head_size]
    Cell* weights = values + (size_t)CHUNK * head_size / DEEP;     // [BAND][CHUNK]
    numbers.assign((size_t)bands * BAND * (head_size + 2) + BAND * CHUNK, 0);
    float* sums = numbers.data();                                  // [rows][head_size]
    float* top = sums + (size_t)bands * BAND * head_size;          // [rows]
    float* total = top + bands * BAND;                             // [rows]
    float* scores = total + bands * BAND;                          // [BAND][CHUNK]
    std::fill(top, top + bands * BAND, LOWEST);
    for (int row = 0; row < rows; ++row)
        Product<T>::pack_left(query_of(row), head_size, left + (size_t)row * head_size / DEEP);

    const int end = tree ? before + length : context + tile.count - 1;  // first position that no token attends to
    for (int begin = 0; begin < end; begin += CHUNK) {
        int valid[GROUPS];  // number of tokens of each group that any token of the tile attends to
        bool any = false;
        for (int g = 0; g < GROUPS; ++g) {
            const int position = begin + g * GROUP, group = position / GROUP;
            const bool left_out = group >= window.sinks && group < window.sinks + least;
            valid[g] = left_out ? 0 : std::max(0, std::min(GROUP, end - position));
            any |= valid[g] > 0;
        }
        if (!any) continue;
        for (int g = 0; g < GROUPS; ++g) {
            Cell* to = values + (size_t)g * GROUP * head_size / DEEP;
            if (!valid[g]) {
                std::fill(to, to + (size_t)GROUP * head_size / DEEP, 0);
                continue;
            }
            const int position = begin + g * GROUP, offset = position % cache.block_size;
            const T* block = block_at<T>(cache, head, request, position);
            pack(block + offset, cache.block_size, head_size, GROUP, keys + (size_t)g * head_size * GROUP / DEEP);
            const T* value = block + (int64_t)(cache.block_size + offset) * head_size;
            if (valid[g] == GROUP) {
                pack(value, head_size, GROUP, head_size, to);
            } else {  // the rest of the block is uninitialised, and 0 times inf or nan is not 0
                std::vector<T> padded((size_t)GROUP * head_size, T{});
                std::copy(value, value + (size_t)valid[g] * head_size, padded.begin());
                pack(padded.data(), head_size, GROUP, head_size, to);
            }
        }
        for (int band = 0; band < bands; ++band) {
            const int first = band * BAND;
            for (int g = 0; g < GROUPS; ++g)
                for (int part = 0; valid[g] && part < GROUP; part += PAIR)
                    multiply<BAND, 2, T>(left + (size_t)first * head_size / DEEP, head_size / DEEP,
                                         keys + (size_t)g * head_size * GROUP / DEEP + part, GROUP, head_size / DEEP,
                                         scores + g * GROUP + part, CHUNK, nullptr);
            float factor[BAND];
            for (int m = 0; m < BAND; ++m) {
                const int t = std::min((first + m) / num_queries_per_kv, tile.count - 1);
                uint32_t seen[GROUPS];
                for (int g = 0; g < GROUPS; ++g) {
                    const int position = begin + g * GROUP, group = position / GROUP;
                    const bool left_out = gaps && group >= window.sinks && group < window.sinks + gaps[t];
                    seen[g] = left_out ? 0 : first_bits(valid[g]);
                    if (tree)
                        seen[g] &= seen_from(tree + (int64_t)(tile.begin + t) * words, words, position - before);
                    else
                        seen[g] &= first_bits(context + t - position);
                }
                go_on(scores + m * CHUNK, seen, scale, top[first + m], total[first + m], factor[m]);
                Product<T>::pack_weights(scores + m * CHUNK, CHUNK, weights + m * CHUNK / DEEP);
            }
            add_values<T>(weights, CHUNK / DEEP, values, CHUNK / DEEP, head_size, sums + (size_t)first * head_size,
                          factor);
        }
    }

    for (int row = 0; row < rows; ++row) {
        const float* from = sums + (size_t)row * head_size;
        const LeftOut rest = left_out(cache, head, window, request, gaps ? gaps[row / num_queries_per_kv] : 0, scale,
                                      query_of(row));
        const float most = std::max(top[row], rest.logit);
        const float kept_scale = std::exp(top[row] - most), means_scale = rest.means ? std::exp(rest.logit - most) : 0;
        const float sum_of_weights = total[row] * kept_scale + means_scale;
        T* to = output + (token + row / num_queries_per_kv) * output_stride +
                (int64_t)(kv_head * num_queries_per_kv + row % num_queries_per_kv) * head_size;
        for (int d = 0; d < head_size; ++d)
            narrow((from[d] * kept_scale + (rest.means ? means_scale * rest.means[head_size + d] : 0)) / sum_of_weights,
                   to + d);
    }
}

template <typename T>
void read_prompts(const Cache& cache, const Prompts& prompts, const Window& window, float scale, const T* query,
                  int64_t query_stride, T* output, int64_t output_stride, int threads) {
    const int step = std::max(1, TILE / (prompts.query_heads / cache.kv_heads));
    std::vector<Tile> tiles;
    for (int p = 0; p < prompts.count; ++p)
        for (int begin = 0; begin < prompts.length[p]; begin += step)
            tiles.push_back({p, begin, std::min(step, prompts.length[p] - begin)});
#pragma omp parallel num_threads(threads)
    {
        std::vector<Cell> cells;
        std::vector<float> numbers;
        const int works = (int)tiles.size() * cache.kv_heads;
#pragma omp for schedule(dynamic)
        for (int work = 0; work < works; ++work)  // the last tiles of a prompt take the longest
            read_tile(cache, prompts, window, scale, query, query_stride, output, output_stride,
                      tiles[tiles.size() - 1 - work / cache.kv_heads], work % cache.kv_heads, cells, numbers);
    }
}

}  // namespace
