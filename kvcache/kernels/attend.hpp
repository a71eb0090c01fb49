// Attention of single query tokens over a paged KV cache in which every KV head may have its own blocks.
//
// A block of a head holds K transposed and then V, in the layout of vLLM's "vec" CPU kernels:
//     K [head_size, block_size], V [block_size, head_size]
// Work is divided into (query token, unit, split): a unit is the query heads that read the same tokens of the same KV
// head, and a split is SPLIT groups of GROUP tokens. Splits are merged by log-sum-exp in their order, so results do not
// depend on the number of threads. Strides are in elements. Softmax is computed in float32.
#pragma once

#include "lanes.hpp"

extern "C" {

struct Head {  // cache and block table of one KV head
    const void* data;      // the head's part of block 0
    int64_t block_stride;
    const int32_t* table;  // [num_requests, table_stride] block table
    int64_t table_stride;
    int32_t windowed;      // 1 for a non-retrieval head, which reads the tokens kept by `Window`
};

struct Cache {
    const Head* heads;  // [num_kv_heads]
    int32_t kv_heads, block_size, head_size;
};

struct Rows {  // the query tokens of a decode batch
    int32_t count, query_heads;
    const int32_t* request;  // [count] row of the block table
    const int32_t* token;    // [count] row of query and output
    const int32_t* context;  // [count] number of tokens to attend to, the query token included
};

struct Choice {  // the selected tokens; all tokens if num_head_groups is 0
    int32_t num_head_groups, capacity;
    int32_t* groups;  // [count, num_head_groups, capacity] indices of groups of GROUP tokens, ascending
    uint32_t* masks;  // [count, num_head_groups, capacity] bit t: token t of the group is selected
    int32_t* sizes;   // [count, num_head_groups] number of groups
};

struct Logits {  // where scaled query-key products are written
    float* data;  // [count, num_heads, stride]; null if they are not needed
    int64_t stride;
    Choice pages;  // the pages whose products are written, one after the other, the same for all heads; if it is empty,
                   // those of all pages are written at their positions
};

struct Window {  // the tokens evicted in non-retrieval heads
    int32_t sinks;        // number of groups that hold the sinks; the evicted groups follow them
    const int32_t* gaps;  // [num_tokens] number of groups evicted for each query token, in whole blocks; null for none
    int64_t means;        // offset in a block, in elements, of the float32 means [2, head_size] of all K and V between
                          // the sinks and this block; negative if there is no compensation token
};

}  // extern "C"

namespace {

constexpr int SPLIT = 8;  // groups in a split

struct Partial { float top, total; };

// Return the block that holds a position of a request.
template <typename T>
inline const T* block_at(const Cache& cache, const Head& head, int request, int position) {
    return (const T*)head.data + head.block_stride * head.table[request * head.table_stride + position / cache.block_size];
}

struct LeftOut {  // the compensation token of the evicted tokens
    const float* means;  // [2, head_size] mean key and mean value; null if no token is evicted
    float logit;         // log of the number of evicted tokens included
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

// Return which page of a row of logits holds the products of a page of the context; negative if none does.
inline int logits_page(const Logits& logits, int row, int page) {
    const Choice& pages = logits.pages;
    if (!pages.num_head_groups) return page;
    const int32_t* begin = pages.groups + (int64_t)row * pages.capacity;
    const int32_t* end = begin + pages.sizes[row];
    const int32_t* found = std::lower_bound(begin, end, page);
    return found < end && *found == page ? (int)(found - begin) : -1;
}

template <typename T>
void decode(const Cache& cache, const Rows& rows, const Choice& choice, const Window& window, float scale, const T* query,
            int64_t query_stride, T* output, int64_t output_stride, const Logits& logits, int threads) {
    const int heads = rows.query_heads, head_size = cache.head_size;
    const int num_queries_per_kv = heads / cache.kv_heads;
    const auto gap_of = [&](int r, int kv_head) {  // number of groups that are evicted after the sinks
        return window.gaps && cache.heads[kv_head].windowed ? window.gaps[rows.token[r]] : 0;
    };
    const int per_unit = choice.num_head_groups == heads ? 1 : num_queries_per_kv;
    const int units = heads / per_unit;

    // Index of each query token's first split.
    std::vector<int32_t> first(rows.count + 1, 0);
    for (int r = 0; r < rows.count; ++r) {
        int groups = (rows.context[r] + GROUP - 1) / GROUP;
        if (choice.num_head_groups) {
            groups = 0;
            for (int s = 0; s < choice.num_head_groups; ++s)
                groups = std::max(groups, choice.sizes[r * choice.num_head_groups + s]);
        }
        first[r + 1] = first[r] + (groups + SPLIT - 1) / SPLIT;
    }
    const int splits = first[rows.count];
    std::vector<Partial> partials((size_t)splits * heads);
    std::unique_ptr<float[]> sums(new float[output ? (size_t)splits * heads * head_size : 0]);  // read only with weights

#pragma omp parallel num_threads(threads)
    {
        std::vector<float> q((size_t)per_unit * head_size), scores((size_t)per_unit * GROUP);
        std::vector<float> weights((size_t)per_unit * SPLIT * GROUP);
        const T* values[SPLIT * GROUP];
        constexpr int64_t width = SPLIT * GROUP;

#pragma omp for schedule(dynamic)
        for (int work = 0; work < splits * units; ++work) {
            const int unit = work % units, split = work / units;
            const int r = (int)(std::upper_bound(first.begin(), first.end(), split) - first.begin()) - 1;
            const int head = unit * per_unit, kv_head = head / num_queries_per_kv, context = rows.context[r];
            const int begin = (split - first[r]) * SPLIT;
            const Head& at = cache.heads[kv_head];
            const int gap = gap_of(r, kv_head);
            int end = (context + GROUP - 1) / GROUP - gap;
            const int32_t* selected = nullptr;
            const uint32_t* masks = nullptr;
            if (choice.num_head_groups) {
                const int64_t head_group =
                    (int64_t)r * choice.num_head_groups + (choice.num_head_groups == 1 ? 0 : unit);
                selected = choice.groups + head_group * choice.capacity;
                masks = choice.masks + head_group * choice.capacity;
                end = choice.sizes[head_group];
            }
            end = std::min(end, begin + SPLIT);

            const T* from = query + rows.token[r] * query_stride + (int64_t)head * head_size;
            for (int i = 0; i < per_unit * head_size; ++i) q[i] = widen(from[i]) * scale;

            // Compute the scores of whole groups, then compact those of the selected tokens.
            int n = 0;
            for (int g = begin; g < end; ++g) {
                const int group = selected ? selected[g] : g < window.sinks ? g : g + gap;
                const int position = group * GROUP, offset = position % cache.block_size;
                const T* keys = block_at<T>(cache, at, rows.request[r], position);
                const T* value = keys + (int64_t)cache.block_size * head_size + (int64_t)offset * head_size;
                keys += offset;
                for (int h = 0; h < per_unit; h += HEADS) {
                    const float* qh = q.data() + (int64_t)h * head_size;
                    float* to = &scores[h * GROUP];
                    switch (std::min(HEADS, per_unit - h)) {
                        case 1: score<1>(qh, head_size, keys, cache.block_size, to, GROUP); break;
                        case 2: score<2>(qh, head_size, keys, cache.block_size, to, GROUP); break;
                        case 3: score<3>(qh, head_size, keys, cache.block_size, to, GROUP); break;
                        default: score<4>(qh, head_size, keys, cache.block_size, to, GROUP);
                    }
                }
                const int valid = std::min(GROUP, context - position);
                const uint32_t all = valid == GROUP ? ~0u : (1u << valid) - 1u;
                const uint32_t mask = masks ? masks[g] & all : all;
                const int page = logits.data ? logits_page(logits, r, group) : -1;
                for (int h = 0; page >= 0 && h < per_unit; ++h)
                    std::memcpy(logits.data + ((int64_t)r * heads + head + h) * logits.stride + page * GROUP,
                                &scores[h * GROUP], valid * sizeof(float));
                if (!output) continue;
                if (mask == ~0u) {
                    for (int t = 0; t < GROUP; ++t) values[n + t] = value + (int64_t)t * head_size;
                    for (int h = 0; h < per_unit; ++h)
                        std::memcpy(&weights[h * width + n], &scores[h * GROUP], GROUP * sizeof(float));
                    n += GROUP;
                } else {
                    for (uint32_t rest = mask; rest; rest &= rest - 1, ++n) {
                        const int t = __builtin_ctz(rest);
                        values[n] = value + (int64_t)t * head_size;
                        for (int h = 0; h < per_unit; ++h) weights[h * width + n] = scores[h * GROUP + t];
                    }
                }
            }

            if (!output) continue;
            for (int h = 0; h < per_unit; ++h) {
                float* w = &weights[h * width];
                const float top = greatest(w, n);  // n <= width, a whole number of lanes
                partials[(int64_t)split * heads + head + h] = {top, exponentials(w, n, top)};
            }
            float* to = &sums[((int64_t)split * heads + head) * head_size];
            for (int h = 0; h < per_unit; h += HEADS) {
                const float* w = &weights[h * width];
                float* s = to + (int64_t)h * head_size;
                switch (std::min(HEADS, per_unit - h)) {
                    case 1: mix<1>(w, width, values, n, head_size, s); break;
                    case 2: mix<2>(w, width, values, n, head_size, s); break;
                    case 3: mix<3>(w, width, values, n, head_size, s); break;
                    default: mix<4>(w, width, values, n, head_size, s);
                }
            }
        }

#pragma omp for schedule(static)
        for (int item = 0; item < (output ? rows.count * heads : 0); ++item) {
            const int r = item / heads, h = item % heads;
            const int gap = gap_of(r, h / num_queries_per_kv);
            const LeftOut rest = left_out(cache, cache.heads[h / num_queries_per_kv], window, rows.request[r], gap,
                                          scale, query + rows.token[r] * query_stride + (int64_t)h * head_size);
            float top = rest.logit, total = 0;
            for (int s = first[r]; s < first[r + 1]; ++s)
                if (partials[(int64_t)s * heads + h].total > 0) top = std::max(top, partials[(int64_t)s * heads + h].top);
            std::vector<float> mixed(head_size, 0.0f);
            if (rest.means) {
                total = std::exp(rest.logit - top);
                for (int d = 0; d < head_size; ++d) mixed[d] = total * rest.means[head_size + d];
            }
            for (int s = first[r]; s < first[r + 1]; ++s) {
                const Partial& part = partials[(int64_t)s * heads + h];
                if (part.total <= 0) continue;
                const float weight = std::exp(part.top - top);
                total += part.total * weight;
                const float* from = &sums[((int64_t)s * heads + h) * head_size];
                for (int d = 0; d < head_size; ++d) mixed[d] += from[d] * weight;
            }
            T* to = output + rows.token[r] * output_stride + (int64_t)h * head_size;
            for (int d = 0; d < head_size; ++d) narrow(mixed[d] / total, to + d);
        }
    }
}

}  // namespace

// Run `call` with T as the number type that `type` names, and return 0; return 1 for an unknown type.
#define FOR_TYPE(call)                                  \
    switch (type) {                                     \
        case 0: { typedef float T; call; return 0; }    \
        case 1: { typedef BFloat16 T; call; return 0; } \
        case 2: { typedef Float16 T; call; return 0; }  \
        default: return 1;                              \
    }
