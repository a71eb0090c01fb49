// Decode attention over a paged KV cache that reads all of it or chosen positions only, and the choice itself.
//
// One query token per row. The cache holds, for each block and KV head, K transposed and then V:
//     K [head_size, block_size], V [block_size, head_size]
// which is the layout of vLLM's "vec" CPU kernels. Work is cut into (row, unit, split): a unit is the query heads that
// read the same KV head and the same positions, a split SPLIT groups of GROUP tokens. Splits are merged by log-sum-exp
// in their order, so results do not depend on the number of threads.
//
// A plain C interface, nothing of torch: pointers, strides in elements, sizes. Softmax runs in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int GROUP = 32;  // tokens chosen or left together by page; one cache line of 16-bit keys
constexpr int SPLIT = 8;   // groups in one piece of work
constexpr int HEADS = 4;   // query heads whose sums stay in registers
constexpr float LOWEST = -1e30f;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UintVec __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));
constexpr int LANES = 16;

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

// The greatest of x[0..n). Up to LANES - 1 values behind it are overwritten with LOWEST.
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

// x[0..n) becomes e^(x - top) for its greatest element top; returns their sum. As above for what lies behind.
inline float exponentials(float* x, int64_t n, float top) {
    Vec total{};
    for (int64_t i = 0; i < n; i += LANES) {
        const Vec e = exponential(load(x + i) - top);
        store(x + i, e);
        total += e;
    }
    return sum(total);
}

// logits[h][0..GROUP) of M query heads against one group of transposed keys.
template <int M, typename T>
inline void score(const float* q, int head_size, const T* keys, int64_t row_stride, float* logits, int64_t out_stride) {
    Vec low[M], high[M];
    for (int h = 0; h < M; ++h) low[h] = high[h] = Vec{};
    for (int d = 0; d < head_size; ++d, keys += row_stride) {
        const Vec a = load(keys), b = load(keys + LANES);
        for (int h = 0; h < M; ++h) {
            const Vec x = splat(q[h * head_size + d]);
            low[h] += x * a;
            high[h] += x * b;
        }
    }
    for (int h = 0; h < M; ++h) {
        store(logits + h * out_stride, low[h]);
        store(logits + h * out_stride + LANES, high[h]);
    }
}

// sums[h] += weights[h] @ values, for M query heads over n positions; BLOCK lanes of the head at a time.
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
    if (head_size % (4 * LANES) == 0) mix<M, 4>(w, stride, values, n, head_size, sums);
    else if (head_size % (2 * LANES) == 0) mix<M, 2>(w, stride, values, n, head_size, sums);
    else mix<M, 1>(w, stride, values, n, head_size, sums);
}

}  // namespace

extern "C" {

struct Cache {
    const void* data;
    int64_t block_stride, head_stride;
    int32_t block_size, head_size, kv_heads;
    const int32_t* block_table;
    int64_t table_stride;
};

struct Rows {  // the query tokens that take part
    int32_t count, query_heads;
    const int32_t* request;  // [count] row of the block table
    const int32_t* token;    // [count] row of query and output
    const int32_t* context;  // [count] tokens to look at, the current one included
};

struct Choice {  // the positions to read; sets = 0 reads all
    int32_t sets, capacity;
    int32_t* groups;  // [count, sets, capacity] group numbers, ascending
    uint32_t* masks;  // [count, sets, capacity] which of a group's tokens
    int32_t* sizes;   // [count, sets]
};

struct Rule {  // how positions are chosen, see `selection.Rule`
    int32_t sets, aggregate, budget, sinks, recent, by_page;
};

}  // extern "C"

namespace {

struct Partial { float top, total; };

template <typename T>
void decode(const Cache& cache, const Rows& rows, const Choice& choice, float scale, const T* query, int64_t query_stride,
            T* output, int64_t output_stride, float* logits, int64_t logits_stride, int threads) {
    const int heads = rows.query_heads, size = cache.head_size;
    const int share = heads / cache.kv_heads;
    const int per_unit = choice.sets == heads ? 1 : share;
    const int units = heads / per_unit;

    // Where each row's pieces of work begin.
    std::vector<int32_t> first(rows.count + 1, 0);
    for (int r = 0; r < rows.count; ++r) {
        int groups = (rows.context[r] + GROUP - 1) / GROUP;
        if (choice.sets) {
            groups = 0;
            for (int s = 0; s < choice.sets; ++s) groups = std::max(groups, choice.sizes[r * choice.sets + s]);
        }
        first[r + 1] = first[r] + (groups + SPLIT - 1) / SPLIT;
    }
    const int splits = first[rows.count];
    std::vector<Partial> partials((size_t)splits * heads);
    std::vector<float> sums((size_t)splits * heads * size);

#pragma omp parallel num_threads(threads)
    {
        std::vector<float> q((size_t)per_unit * size), found((size_t)per_unit * GROUP);
        std::vector<float> weights((size_t)per_unit * SPLIT * GROUP);
        const T* values[SPLIT * GROUP];
        constexpr int64_t width = SPLIT * GROUP;

#pragma omp for schedule(dynamic)
        for (int work = 0; work < splits * units; ++work) {
            const int unit = work % units, split = work / units;
            const int r = (int)(std::upper_bound(first.begin(), first.end(), split) - first.begin()) - 1;
            const int head = unit * per_unit, kv_head = head / share, context = rows.context[r];
            const int begin = (split - first[r]) * SPLIT;
            int end = (context + GROUP - 1) / GROUP;
            const int32_t* chosen = nullptr;
            const uint32_t* masks = nullptr;
            if (choice.sets) {
                const int64_t set = (int64_t)r * choice.sets + (choice.sets == 1 ? 0 : unit);
                chosen = choice.groups + set * choice.capacity;
                masks = choice.masks + set * choice.capacity;
                end = choice.sizes[set];
            }
            end = std::min(end, begin + SPLIT);

            const T* from = query + rows.token[r] * query_stride + (int64_t)head * size;
            for (int i = 0; i < per_unit * size; ++i) q[i] = widen(from[i]) * scale;

            // Scores of whole groups, then the tokens that count are moved together.
            int n = 0;
            for (int g = begin; g < end; ++g) {
                const int group = chosen ? chosen[g] : g;
                const int position = group * GROUP, offset = position % cache.block_size;
                const int64_t block =
                    cache.block_table[rows.request[r] * cache.table_stride + position / cache.block_size];
                const T* keys = (const T*)cache.data + block * cache.block_stride + kv_head * cache.head_stride;
                const T* value = keys + (int64_t)cache.block_size * size + (int64_t)offset * size;
                keys += offset;
                for (int h = 0; h < per_unit; h += HEADS) {
                    const float* qh = q.data() + (int64_t)h * size;
                    float* to = &found[h * GROUP];
                    switch (std::min(HEADS, per_unit - h)) {
                        case 1: score<1>(qh, size, keys, cache.block_size, to, GROUP); break;
                        case 2: score<2>(qh, size, keys, cache.block_size, to, GROUP); break;
                        case 3: score<3>(qh, size, keys, cache.block_size, to, GROUP); break;
                        default: score<4>(qh, size, keys, cache.block_size, to, GROUP);
                    }
                }
                const int valid = std::min(GROUP, context - position);
                const uint32_t all = valid == GROUP ? ~0u : (1u << valid) - 1u;
                const uint32_t mask = masks ? masks[g] & all : all;
                if (logits)
                    for (int h = 0; h < per_unit; ++h)
                        std::memcpy(logits + ((int64_t)r * heads + head + h) * logits_stride + position,
                                    &found[h * GROUP], valid * sizeof(float));
                if (mask == ~0u) {
                    for (int t = 0; t < GROUP; ++t) values[n + t] = value + (int64_t)t * size;
                    for (int h = 0; h < per_unit; ++h)
                        std::memcpy(&weights[h * width + n], &found[h * GROUP], GROUP * sizeof(float));
                    n += GROUP;
                } else {
                    for (uint32_t rest = mask; rest; rest &= rest - 1, ++n) {
                        const int t = __builtin_ctz(rest);
                        values[n] = value + (int64_t)t * size;
                        for (int h = 0; h < per_unit; ++h) weights[h * width + n] = found[h * GROUP + t];
                    }
                }
            }

            for (int h = 0; h < per_unit; ++h) {
                float* w = &weights[h * width];
                const float top = greatest(w, n);  // n <= width, a whole number of lanes
                partials[(int64_t)split * heads + head + h] = {top, exponentials(w, n, top)};
            }
            float* to = &sums[((int64_t)split * heads + head) * size];
            for (int h = 0; h < per_unit; h += HEADS) {
                const float* w = &weights[h * width];
                float* s = to + (int64_t)h * size;
                switch (std::min(HEADS, per_unit - h)) {
                    case 1: mix<1>(w, width, values, n, size, s); break;
                    case 2: mix<2>(w, width, values, n, size, s); break;
                    case 3: mix<3>(w, width, values, n, size, s); break;
                    default: mix<4>(w, width, values, n, size, s);
                }
            }
        }

#pragma omp for schedule(static)
        for (int item = 0; item < rows.count * heads; ++item) {
            const int r = item / heads, h = item % heads;
            float top = LOWEST, total = 0;
            for (int s = first[r]; s < first[r + 1]; ++s)
                if (partials[(int64_t)s * heads + h].total > 0) top = std::max(top, partials[(int64_t)s * heads + h].top);
            std::vector<float> mixed(size, 0.0f);
            for (int s = first[r]; s < first[r + 1]; ++s) {
                const Partial& part = partials[(int64_t)s * heads + h];
                if (part.total <= 0) continue;
                const float weight = std::exp(part.top - top);
                total += part.total * weight;
                const float* from = &sums[((int64_t)s * heads + h) * size];
                for (int d = 0; d < size; ++d) mixed[d] += from[d] * weight;
            }
            T* to = output + rows.token[r] * output_stride + (int64_t)h * size;
            for (int d = 0; d < size; ++d) narrow(mixed[d] / total, to + d);
        }
    }
}

enum Aggregate { SUM, MAX, UNION };

// The k-th largest of x[0..n), k >= 1.
float kth_largest(const float* x, int n, int k, std::vector<float>& scratch) {
    if (k >= n) return *std::min_element(x, x + n);
    scratch.assign(x, x + n);
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), [](float a, float b) { return a > b; });
    return scratch[k - 1];
}

}  // namespace

extern "C" {

// Attention of one query token per row. type: 0 float32, 1 bfloat16, 2 float16. Strides are in elements.
// logits: null, or [count, query_heads, logits_stride] float32 that takes the scaled scores of all positions.
// Returns 0, or 1 for an unknown type.
int pilotfish_decode(int type, const Cache* cache, const Rows* rows, const Choice* choice, float scale, const void* query,
                     int64_t query_stride, void* output, int64_t output_stride, float* logits, int64_t logits_stride,
                     int threads) {
#define DECODE(T) \
    decode<T>(*cache, *rows, *choice, scale, (const T*)query, query_stride, (T*)output, output_stride, logits, \
              logits_stride, threads)
    switch (type) {
        case 0: DECODE(float); return 0;
        case 1: DECODE(BFloat16); return 0;
        case 2: DECODE(Float16); return 0;
        default: return 1;
    }
#undef DECODE
}

// How much each position matters: softmax over positions for each head, then one number for each set and position.
// importance: [count, sets, stride] float32. The logits are overwritten.
void pilotfish_importance(const Rows* rows, const Rule* rule, float* logits, float* importance, int64_t stride,
                          int threads) {
    const int heads = rows->query_heads, sets = rule->sets, share = heads / sets;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int item = 0; item < rows->count * heads; ++item) {  // softmax in place
            float* s = logits + (int64_t)item * stride;
            const int n = rows->context[item / heads];
            const float inverse = 1.0f / exponentials(s, n, greatest(s, n));  // stride is a whole number of groups
            float least = 0;
            if (rule->aggregate == UNION) least = kth_largest(s, n, rule->budget - rule->recent, scratch);
            for (int t = 0; t < n; ++t) s[t] = s[t] >= least ? s[t] * inverse : 0.0f;
        }
        constexpr int PIECE = 1024;
        const int pieces = (int)((stride + PIECE - 1) / PIECE);
#pragma omp for schedule(static)
        for (int item = 0; item < rows->count * sets * pieces; ++item) {
            const int piece = item % pieces, set = item / pieces % sets, r = item / pieces / sets;
            const int begin = piece * PIECE, end = std::min(rows->context[r], begin + PIECE);
            float* to = importance + ((int64_t)r * sets + set) * stride;
            for (int h = 0; h < share; ++h) {
                const float* s = logits + ((int64_t)r * heads + set * share + h) * stride;
                if (h == 0)
                    for (int t = begin; t < end; ++t) to[t] = s[t];
                else if (rule->aggregate == MAX)
                    for (int t = begin; t < end; ++t) to[t] = std::max(to[t], s[t]);
                else
                    for (int t = begin; t < end; ++t) to[t] += s[t];
            }
        }
    }
}

// Choose positions by importance; sinks, recent tokens and the current one are always among them.
// Ties go to the earlier position. Rows whose context fits the budget keep everything.
void pilotfish_choose(const Rows* rows, const Rule* rule, const float* importance, int64_t stride, Choice* choice,
                      int threads) {
    const int sets = rule->sets;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> score, scratch;
        std::vector<uint32_t> mask;
#pragma omp for schedule(dynamic)
        for (int item = 0; item < rows->count * sets; ++item) {
            const int n = rows->context[item / sets], groups = (n + GROUP - 1) / GROUP;
            const float* x = importance + (int64_t)item * stride;
            const int unit = rule->by_page ? GROUP : 1;  // tokens that are kept or left together
            const int units = (n + unit - 1) / unit, budget = rule->budget / unit;
            const int sinks = std::min(units, (rule->sinks + unit - 1) / unit);
            const int recent = std::max(0, n - 1 - rule->recent) / unit;  // first unit that is recent
            score.resize(units);
            for (int u = 0; u < units; ++u) {
                float total = 0;
                for (int t = u * unit; t < std::min(n, (u + 1) * unit); ++t) total += x[t];
                score[u] = total;
            }
            mask.assign(groups, 0);
            const auto keep = [&](int u) { mask[u * unit / GROUP] |= unit == GROUP ? ~0u : 1u << (u % GROUP); };
            for (int u = 0; u < sinks; ++u) keep(u);
            for (int u = std::max(sinks, recent); u < units; ++u) keep(u);
            const int between = recent - sinks;
            const int wanted = std::min(between, budget - sinks - (units - std::max(sinks, recent)));
            if (wanted > 0) {
                const float least = kth_largest(score.data() + sinks, between, wanted, scratch);
                int ties = wanted;
                for (int u = sinks; u < recent; ++u)
                    if (score[u] > least) keep(u), --ties;
                for (int u = sinks; u < recent && ties > 0; ++u)
                    if (score[u] == least) keep(u), --ties;
            }
            int size = 0;
            for (int g = 0; g < groups; ++g)
                if (mask[g]) {
                    choice->groups[(int64_t)item * choice->capacity + size] = g;
                    choice->masks[(int64_t)item * choice->capacity + size] = mask[g];
                    ++size;
                }
            choice->sizes[item] = size;
        }
    }
}

}  // extern "C"
