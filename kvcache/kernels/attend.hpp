// Attention of single query tokens over a paged KV cache in which every KV head may have blocks of its own.
//
// A block of a head holds K transposed and then V, in the layout of vLLM's "vec" CPU kernels:
//     K [head_size, block_size], V [block_size, head_size]
// Work is cut into (row, unit, split): a unit is the query heads that read the same KV head and the same positions, a
// split SPLIT groups of GROUP tokens. Splits are merged by log-sum-exp in their order, so results do not depend on the
// number of threads. Strides are in elements; softmax runs in float32.
#pragma once

#include "lanes.hpp"

extern "C" {

struct Head {  // where the keys and values of a KV head are
    const void* data;      // its part of block 0
    int64_t block_stride;
    const int32_t* table;  // [requests, table_stride] numbers of blocks
    int64_t table_stride;
    int32_t windowed;      // reads what `Window` leaves
};

struct Cache {
    const Head* heads;  // [kv_heads]
    int32_t kv_heads, block_size, head_size;
};

struct Rows {  // the query tokens that take part
    int32_t count, query_heads;
    const int32_t* request;  // [count] row of the block tables
    const int32_t* token;    // [count] row of query and output
    const int32_t* context;  // [count] tokens to look at, the current one included
};

struct Choice {  // the positions to read; sets = 0 reads all
    int32_t sets, capacity;
    int32_t* groups;  // [count, sets, capacity] group numbers, ascending
    uint32_t* masks;  // [count, sets, capacity] which of a group's tokens
    int32_t* sizes;   // [count, sets]
};

struct Window {  // what windowed heads leave out; no gaps: nothing
    int32_t sinks;        // groups before it
    const int32_t* gaps;  // [tokens] groups left out by each row of the query, whole blocks
    int64_t means;        // elements from a block's beginning to the float32 means of all K and V [2, head_size] between
                          // the sinks and this block; negative: there are none, and what is left out is forgotten
};

}  // extern "C"

namespace {

constexpr int SPLIT = 8;  // groups in one piece of work

struct Partial { float top, total; };

// The block that holds a position of a request.
template <typename T>
inline const T* block_at(const Cache& cache, const Head& head, int request, int position) {
    return (const T*)head.data + head.block_stride * head.table[request * head.table_stride + position / cache.block_size];
}

struct LeftOut {  // what a window leaves out, as one more position; no means: nothing
    const float* means;  // of K and V, [2, head_size]
    float logit;         // with their weight
};

template <typename T>
inline LeftOut left_out(const Cache& cache, const Head& head, const Window& window, int request, int gap, float scale,
                        const T* query) {
    if (!gap || window.means < 0) return {nullptr, LOWEST};
    const float* means =
        (const float*)(block_at<T>(cache, head, request, (window.sinks + gap) * GROUP) + window.means);
    float product = 0;
    for (int d = 0; d < cache.head_size; ++d) product += widen(query[d]) * means[d];
    return {means, product * scale + std::log((float)(gap * GROUP))};
}

template <typename T>
void decode(const Cache& cache, const Rows& rows, const Choice& choice, const Window& window, float scale, const T* query,
            int64_t query_stride, T* output, int64_t output_stride, float* logits, int64_t logits_stride, int threads) {
    const int heads = rows.query_heads, size = cache.head_size;
    const int share = heads / cache.kv_heads;
    const auto gap_of = [&](int r, int kv_head) {  // groups that a head leaves out behind the sinks
        return window.gaps && cache.heads[kv_head].windowed ? window.gaps[rows.token[r]] : 0;
    };
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
    std::unique_ptr<float[]> sums(new float[(size_t)splits * heads * size]);  // read where there are weights only

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
            const Head& at = cache.heads[kv_head];
            const int gap = gap_of(r, kv_head);
            int end = (context + GROUP - 1) / GROUP - gap;
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
                const int group = chosen ? chosen[g] : g < window.sinks ? g : g + gap;
                const int position = group * GROUP, offset = position % cache.block_size;
                const T* keys = block_at<T>(cache, at, rows.request[r], position);
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
            const int gap = gap_of(r, h / share);
            const LeftOut rest = left_out(cache, cache.heads[h / share], window, rows.request[r], gap, scale,
                                          query + rows.token[r] * query_stride + (int64_t)h * size);
            float top = rest.logit, total = 0;
            for (int s = first[r]; s < first[r + 1]; ++s)
                if (partials[(int64_t)s * heads + h].total > 0) top = std::max(top, partials[(int64_t)s * heads + h].top);
            std::vector<float> mixed(size, 0.0f);
            if (rest.means) {
                total = std::exp(rest.logit - top);
                for (int d = 0; d < size; ++d) mixed[d] = total * rest.means[size + d];
            }
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

}  // namespace

// Return from a function after `call`, in which T is the number type of the function's `type`; 1 for an unknown one.
#define FOR_TYPE(call)                                  \
    switch (type) {                                     \
        case 0: { typedef float T; call; return 0; }    \
        case 1: { typedef BFloat16 T; call; return 0; } \
        case 2: { typedef Float16 T; call; return 0; }  \
        default: return 1;                              \
    }
