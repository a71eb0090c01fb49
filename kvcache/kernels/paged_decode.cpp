// Decode attention over a paged KV cache that reads all of it or chosen positions only, and the choice itself.
//
// All KV heads share their blocks here. A plain C interface, nothing of torch: pointers, strides in elements, sizes.

#include "attend.hpp"

extern "C" {

struct Rule {  // how positions are chosen, see `selection.Rule`
    int32_t sets, aggregate, budget, sinks, recent, by_page;
};

}  // extern "C"

namespace {

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
    const Window nothing = {0, nullptr, -1};
    FOR_TYPE(decode<T>(*cache, *rows, *choice, nothing, scale, (const T*)query, query_stride, (T*)output, output_stride,
                       logits, logits_stride, threads))
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
