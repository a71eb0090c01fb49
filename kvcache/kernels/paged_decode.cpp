// Decode attention over a paged KV cache, full or over selected tokens, and top-k token selection.
//
// All KV heads share their blocks here. The interface is plain C without torch: pointers, strides in elements, sizes.

#include "attend.hpp"

extern "C" {

struct Rule {  // selection rule, see `selection.SelectionRule`
    int32_t num_head_groups, aggregate, budget, sinks, recent, by_page;
};

}  // extern "C"

namespace {

enum Aggregate { SUM, MAX, UNION };

// Return the k-th largest value of x[0..n), k >= 1; the smallest if k >= n.
float kth_largest(const float* x, int n, int k, std::vector<float>& scratch) {
    if (k >= n) return *std::min_element(x, x + n);
    scratch.assign(x, x + n);
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), [](float a, float b) { return a > b; });
    return scratch[k - 1];
}

}  // namespace

extern "C" {

// Compute the attention of a batch of query tokens. type: 0 float32, 1 bfloat16, 2 float16. Strides are in elements.
// output: null if only logits are needed. Return 0, or 1 for an unknown type.
int pilotfish_decode(int type, const Cache* cache, const Rows* rows, const Choice* choice, float scale, const void* query,
                     int64_t query_stride, void* output, int64_t output_stride, const Logits* logits, int threads) {
    const Window nothing = {0, nullptr, -1};
    FOR_TYPE(decode<T>(*cache, *rows, *choice, nothing, scale, (const T*)query, query_stride, (T*)output, output_stride,
                       *logits, threads))
}

// Compute the attention weight of each token: a softmax for each head, then the sum or maximum over each head group.
// importance: [count, num_head_groups, stride] float32. The logits are overwritten.
void pilotfish_token_scores(const Rows* rows, const Rule* rule, float* logits, float* importance, int64_t stride,
                          int threads) {
    const int heads = rows->query_heads, num_head_groups = rule->num_head_groups;
    const int num_queries_per_group = heads / num_head_groups;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int item = 0; item < rows->count * heads; ++item) {  // softmax in place
            float* s = logits + (int64_t)item * stride;
            const int n = rows->context[item / heads];
            const float inverse = 1.0f / exponentials(s, n, greatest(s, n));  // stride is a multiple of GROUP
            float least = 0;
            if (rule->aggregate == UNION) least = kth_largest(s, n, rule->budget - rule->recent, scratch);
            for (int t = 0; t < n; ++t) s[t] = s[t] >= least ? s[t] * inverse : 0.0f;
        }
        constexpr int PIECE = 1024;
        const int pieces = (int)((stride + PIECE - 1) / PIECE);
#pragma omp for schedule(static)
        for (int item = 0; item < rows->count * num_head_groups * pieces; ++item) {
            const int piece = item % pieces, head_group = item / pieces % num_head_groups;
            const int r = item / pieces / num_head_groups;
            const int begin = piece * PIECE, end = std::min(rows->context[r], begin + PIECE);
            float* to = importance + ((int64_t)r * num_head_groups + head_group) * stride;
            for (int h = 0; h < num_queries_per_group; ++h) {
                const float* s = logits + ((int64_t)r * heads + head_group * num_queries_per_group + h) * stride;
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

// Select the tokens of highest importance; sinks, recent tokens and the current token are always selected.
// Of equally important tokens the earlier one is selected. If the context fits the budget, all tokens are selected.
// per_unit: whether importance is that of units (pages or tokens) instead of tokens.
void pilotfish_select_tokens(const Rows* rows, const Rule* rule, const float* importance, int64_t stride, Choice* choice,
                      int per_unit, int threads) {
    const int num_head_groups = rule->num_head_groups;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> score, scratch;
        std::vector<uint32_t> mask;
#pragma omp for schedule(dynamic)
        for (int item = 0; item < rows->count * num_head_groups; ++item) {
            const int n = rows->context[item / num_head_groups], groups = (n + GROUP - 1) / GROUP;
            const float* x = importance + (int64_t)item * stride;
            const int unit = rule->by_page ? GROUP : 1;  // tokens that are selected together
            const int units = (n + unit - 1) / unit, budget = rule->budget / unit;
            const int sinks = std::min(units, (rule->sinks + unit - 1) / unit);
            const int recent = std::max(0, n - 1 - rule->recent) / unit;  // first unit with a recent token
            score.resize(units);
            for (int u = 0; u < units; ++u) {
                float total = per_unit ? x[u] : 0;
                for (int t = u * unit; !per_unit && t < std::min(n, (u + 1) * unit); ++t) total += x[t];
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
            int count = 0;
            for (int g = 0; g < groups; ++g)
                if (mask[g]) {
                    choice->groups[(int64_t)item * choice->capacity + count] = g;
                    choice->masks[(int64_t)item * choice->capacity + count] = mask[g];
                    ++count;
                }
            choice->sizes[item] = count;
        }
    }
}

}  // extern "C"
