// Page bounds of a paged KV cache (Quest, arXiv 2406.10774): their update, and the scores of pages for a query.
//
// A page is a group of GROUP tokens of a block. Its bounds are [2, head_size]: minimum and maximum of each channel.
// They are indexed by physical page, so a block that requests share has one set of bounds.

#include "attend.hpp"

namespace {

// Compute the bounds of the pages with newly written slots, from the keys of these pages in the cache up to the slots.
template <typename T>
void update(const Cache& cache, const int64_t* slots, int count, T* bounds, int threads) {
    const int head_size = cache.head_size, block_size = cache.block_size;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (count > 4)
    for (int i = 0; i < count; ++i)
        for (int h = 0; h < cache.kv_heads; ++h) {
            const int64_t slot = slots[i], block = slot / block_size;
            if (slot < 0) continue;  // padding
            if (i + 1 < count && slots[i + 1] > slot && slots[i + 1] / GROUP == slot / GROUP) continue;  // not the last
            const int offset = (int)(slot % block_size), first = offset / GROUP * GROUP;
            const T* keys = (const T*)cache.heads[h].data + block * cache.heads[h].block_stride;
            T* low = bounds + ((slot / GROUP) * cache.kv_heads + h) * 2 * head_size;
            T* high = low + head_size;
            for (int d = 0; d < head_size; ++d) {
                const T* row = keys + (int64_t)d * block_size;  // K is stored transposed
                float least = widen(row[first]), most = least;
                int begin = first, end = first;
                for (int t = first + 1; t <= offset; ++t) {
                    const float x = widen(row[t]);
                    if (x < least) least = x, begin = t;
                    if (x > most) most = x, end = t;
                }
                low[d] = row[begin];
                high[d] = row[end];
            }
        }
}

// Score all pages of each query token's context: the largest product with the query that the bounds allow.
template <typename T>
void score(const Cache& cache, const Rows& rows, const T* bounds, float scale, const T* query, int64_t query_stride,
           float* logits, int64_t stride, int threads) {
    const int head_size = cache.head_size, share = rows.query_heads / cache.kv_heads;
    const int pages_per_block = cache.block_size / GROUP;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> positive(head_size), negative(head_size);
#pragma omp for schedule(dynamic) collapse(2)
        for (int r = 0; r < rows.count; ++r)
            for (int head = 0; head < rows.query_heads; ++head) {
                const int h = head / share, pages = (rows.context[r] + GROUP - 1) / GROUP;
                const Head& kv = cache.heads[h];
                const T* q = query + rows.token[r] * query_stride + (int64_t)head * head_size;
                for (int d = 0; d < head_size; ++d) {
                    const float x = widen(q[d]) * scale;
                    positive[d] = std::max(x, 0.0f);
                    negative[d] = std::min(x, 0.0f);
                }
                float* out = logits + ((int64_t)r * rows.query_heads + head) * stride;
                for (int p = 0; p < pages; ++p) {
                    const int64_t block = kv.table[rows.request[r] * kv.table_stride + p / pages_per_block];
                    const T* low = bounds + ((block * pages_per_block + p % pages_per_block) * cache.kv_heads + h) * 2 * head_size;
                    const T* high = low + head_size;
                    float total = 0;
#pragma omp simd reduction(+ : total)
                    for (int d = 0; d < head_size; ++d)
                        total += positive[d] * widen(high[d]) + negative[d] * widen(low[d]);
                    out[p] = total;
                }
            }
    }
}

}  // namespace

extern "C" {

// slots: [count] written slots, those of a request in ascending order; negative ones are ignored.
// bounds: [num_blocks * block_size / GROUP, num_kv_heads, 2, head_size] in the type of the cache.
int pilotfish_update_bounds(int type, const Cache* cache, const int64_t* slots, int count, void* bounds, int threads) {
    FOR_TYPE(update<T>(*cache, slots, count, (T*)bounds, threads))
}

// logits: [count, num_heads, stride] float32, of which the entries of the pages of each context are written.
int pilotfish_bound_logits(int type, const Cache* cache, const Rows* rows, const void* bounds, float scale,
                           const void* query, int64_t query_stride, float* logits, int64_t stride, int threads) {
    FOR_TYPE(score<T>(*cache, *rows, (const T*)bounds, scale, (const T*)query, query_stride, logits, stride, threads))
}

}  // extern "C"
