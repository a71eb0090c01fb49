// Attention of draft trees over a paged cache, and moving what was accepted of them to where it belongs.
//
// A tree's tokens lie in the cache one behind the other, whatever their depth; `Prompts::seen` says which of them each
// sees. Everything before the tree is seen by all of it, so a tile of its tokens reads that once.

#include "prompt.hpp"

namespace {

template <typename T>
void move(const Cache& cache, const int64_t* from, const int64_t* to, int count) {
    const int size = cache.head_size, block_size = cache.block_size;
    const auto block_of = [&](const Head& head, int64_t slot) {
        return (T*)head.data + slot / block_size * head.block_stride;
    };
    for (int h = 0; h < cache.kv_heads; ++h)
        for (int i = 0; i < count; ++i) {
            const T* source = block_of(cache.heads[h], from[i]);
            T* target = block_of(cache.heads[h], to[i]);
            const int64_t at = from[i] % block_size, there = to[i] % block_size;
            for (int d = 0; d < size; ++d) target[(int64_t)d * block_size + there] = source[(int64_t)d * block_size + at];
            std::memmove(target + (block_size + there) * size, source + (block_size + at) * size, size * sizeof(T));
        }
}

template <typename T>
void move_all(const Cache* layers, int count, const int64_t* from, const int64_t* to, int tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < count; ++i) move<T>(layers[i], from, to, tokens);
}

}  // namespace

extern "C" {

// Attention of whole trees.
int pilotfish_read_trees(int type, const Cache* cache, const Prompts* trees, float scale, const void* query,
                         int64_t query_stride, void* output, int64_t output_stride, int threads) {
    const Window nothing = {0, nullptr, -1};
    FOR_TYPE(read_prompts(*cache, *trees, nothing, scale, (const T*)query, query_stride, (T*)output, output_stride, threads))
}

// Copy keys and values of tokens from slot to slot (block * block_size + offset), one after the other, in all layers.
int pilotfish_move(int type, const Cache* layers, int count, const int64_t* from, const int64_t* to, int tokens,
                   int threads) {
    FOR_TYPE(move_all<T>(layers, count, from, to, tokens, threads))
}

}  // extern "C"
