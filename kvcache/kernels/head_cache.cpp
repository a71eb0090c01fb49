// A KV cache in which every KV head has its own blocks: writes to it, the means of the tokens that are evicted in
// non-retrieval heads, and attention over it.
//
// The interface is plain C without torch: pointers, strides in elements, sizes. type: 0 float32, 1 bfloat16, 2 float16.
// Functions return 0, or 1 for an unknown type.

#include "prompt.hpp"

namespace {

template <typename T>
void store(const Cache& cache, const int64_t* const* slots, int tokens, const T* key, int64_t key_stride, const T* value,
           int64_t value_stride, int threads) {
    const int head_size = cache.head_size, block_size = cache.block_size;
    constexpr int PIECE = 128;  // tokens that one thread writes one after the other
    const int pieces = (tokens + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens > 16)
    for (int work = 0; work < pieces * cache.kv_heads; ++work) {
        const int h = work / pieces, begin = work % pieces * PIECE;
        const Head& head = cache.heads[h];
        for (int t = begin; t < std::min(tokens, begin + PIECE); ++t) {
            const int64_t slot = slots[h][t];
            if (slot < 0) continue;  // padding
            T* block = (T*)head.data + slot / block_size * head.block_stride;
            const int64_t offset = slot % block_size;
            const T* k = key + t * key_stride + (int64_t)h * head_size;
            for (int d = 0; d < head_size; ++d) block[(int64_t)d * block_size + offset] = k[d];
            std::memcpy(block + (int64_t)(block_size + offset) * head_size,
                        value + t * value_stride + (int64_t)h * head_size, head_size * sizeof(T));
        }
    }
}

template <typename T>
void update_means(const Cache& cache, int requests, const int32_t* begins, const int32_t* ends, int sinks, int64_t means,
                  int threads) {
    const int head_size = cache.head_size, block_size = cache.block_size;
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
    for (int r = 0; r < requests; ++r)
        for (int h = 0; h < cache.kv_heads; ++h) {
            const Head& head = cache.heads[h];
            if (!head.windowed) continue;
            const auto block_at = [&](int j) {
                return (T*)head.data + head.block_stride * head.table[r * head.table_stride + j];
            };
            // Blocks that get their first token in this step.
            for (int j = std::max((begins[r] + block_size - 1) / block_size, sinks); j * block_size < ends[r]; ++j) {
                float* to = (float*)(block_at(j) + means);
                if (j == sinks) {
                    std::fill(to, to + 2 * head_size, 0.0f);
                    continue;
                }
                const T* block = block_at(j - 1);
                const float* before = (const float*)(block + means);
                const float old = (float)(j - 1 - sinks) / (j - sinks), added = 1.0f / ((j - sinks) * (float)block_size);
                for (int d = 0; d < head_size; ++d) {
                    float total = 0;
                    for (int t = 0; t < block_size; ++t) total += widen(block[(int64_t)d * block_size + t]);
                    to[d] = before[d] * old + total * added;
                }
                std::vector<float> total(head_size, 0.0f);
                for (int t = 0; t < block_size; ++t)
                    for (int d = 0; d < head_size; ++d)
                        total[d] += widen(block[(int64_t)(block_size + t) * head_size + d]);
                for (int d = 0; d < head_size; ++d) to[head_size + d] = before[head_size + d] * old + total[d] * added;
            }
        }
}

}  // namespace

extern "C" {

// Write the keys and values of tokens. slots: for each KV head [num_tokens], block * block_size + offset; negative for
// padding.
int pilotfish_store(int type, const Cache* cache, const int64_t* const* slots, int tokens, const void* key,
                    int64_t key_stride, const void* value, int64_t value_stride, int threads) {
    FOR_TYPE(store<T>(*cache, slots, tokens, (const T*)key, key_stride, (const T*)value, value_stride, threads))
}

// Compute, for each block that gets its first token at positions begins[r] to ends[r], the means of K and V over all
// blocks between the sinks and this block. They follow from the block before it, which is full by then, so there is no
// state outside the cache.
int pilotfish_update_means(int type, const Cache* cache, int requests, const int32_t* begins, const int32_t* ends,
                           int sinks, int64_t means, int threads) {
    FOR_TYPE(update_means<T>(*cache, requests, begins, ends, sinks, means, threads))
}

// Compute the attention of a batch of query tokens; non-retrieval heads attend to the tokens that the window keeps.
int pilotfish_attend(int type, const Cache* cache, const Rows* rows, const Window* window, float scale, const void* query,
                     int64_t query_stride, void* output, int64_t output_stride, int threads) {
    const Choice everything = {0, 0, nullptr, nullptr, nullptr};
    constexpr int TOGETHER = 64;  // query tokens whose partial sums are in memory at the same time
    const auto some = [&](auto* q, auto* out) {
        for (int begin = 0; begin < rows->count; begin += TOGETHER) {
            const Rows part = {std::min(TOGETHER, rows->count - begin), rows->query_heads, rows->request + begin,
                               rows->token + begin, rows->context + begin};
            decode(*cache, part, everything, *window, scale, q, query_stride, out, output_stride, Logits{}, threads);
        }
    };
    FOR_TYPE(some((const T*)query, (T*)output))
}

// Compute the same for spans of consecutive query tokens.
int pilotfish_read_prompts(int type, const Cache* cache, const Prompts* prompts, const Window* window, float scale,
                           const void* query, int64_t query_stride, void* output, int64_t output_stride, int threads) {
    FOR_TYPE(read_prompts(*cache, *prompts, *window, scale, (const T*)query, query_stride, (T*)output, output_stride,
                          threads))
}

}  // extern "C"
