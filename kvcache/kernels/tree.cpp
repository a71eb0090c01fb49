// Tree attention over a paged KV cache, and copies of the keys and values of accepted draft tokens within the cache.
//
// The tokens of a tree occupy consecutive positions, whatever their depth. `Prompts::seen` is their attention mask. All
// of them attend to all tokens before the tree, so a tile of tree tokens reads these keys and values once.

#include "prompt.hpp"

namespace {

template <typename T>
void move(const Cache& cache, const int64_t* from, const int64_t* to, int count) {
    const int head_size = cache.head_size, block_size = cache.block_size;
    const auto block_of = [&](const Head& head, int64_t slot) {
        return (T*)head.data + slot / block_size * head.block_stride;
    };
    for (int h = 0; h < cache.kv_heads; ++h)
        for (int i = 0; i < count; ++i) {
            const T* source = block_of(cache.heads[h], from[i]);
            T* target = block_of(cache.heads[h], to[i]);
            const int64_t source_offset = from[i] % block_size, target_offset = to[i] % block_size;
            for (int d = 0; d < head_size; ++d)
                target[(int64_t)d * block_size + target_offset] = source[(int64_t)d * block_size + source_offset];
            std::memmove(target + (block_size + target_offset) * head_size,
                         source + (block_size + source_offset) * head_size, head_size * sizeof(T));
        }
}

template <typename T>
void move_all(const Cache* layers, int count, const int64_t* from, const int64_t* to, int tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < count; ++i) move<T>(layers[i], from, to, tokens);
}

}  // namespace

extern "C" {

// Compute the attention of all tokens of the trees.
int pilotfish_read_trees(int type, const Cache* cache, const Prompts* trees, float scale, const void* query,
                         int64_t query_stride, void* output, int64_t output_stride, int threads) {
    const Window nothing = {0, nullptr, -1};
    FOR_TYPE(read_prompts(*cache, *trees, nothing, scale, (const T*)query, query_stride, (T*)output, output_stride, threads))
}

// Copy keys and values from slot to slot (block * block_size + offset), one token after the other, in all layers.
int pilotfish_move(int type, const Cache* layers, int count, const int64_t* from, const int64_t* to, int tokens,
                   int threads) {
    FOR_TYPE(move_all<T>(layers, count, from, to, tokens, threads))
}

}  // extern "C"
