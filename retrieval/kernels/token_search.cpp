// Search in a token index (XTR, arXiv 2304.01982; imputation by centroids as in WARP, arXiv 2501.17788).
//
// For each query token: read the nprobe nearest inverted lists, compute the similarity to every token in them, and keep
// the largest one of each document. Documents without a retrieved token get the imputed similarity. Scalar-quantised
// codes are read as integers: for levels c, smallest values l and steps s, q . (l + s c) = q . l + (q s) . c, and
// rounding q s to 8 bits makes the last term an inner product of small integers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum Codec { SQ4 = 0, SQ8 = 1, HALF = 2, TABLE = 3 };
enum Impute { NOTHING = 0, WARP = 1, KPRIME = 2 };

struct Segment {
  const int64_t* starts;     // [lists + 1]
  const int32_t* documents;  // [rows]
  const uint8_t* codes;      // [rows, code_size]
};

struct Index {
  int32_t dimension, lists, codec, code_size;
  int32_t groups, group_size, factored;  // TABLE: bytes of a code, dimensions per byte, is there a float16 factor
  int32_t segments;
  const float* low;        // [dimension] smallest values, SQ4 and SQ8
  const float* step;       // [dimension] distance of two levels, SQ4 and SQ8
  const float* codebooks;  // [groups, 256, group_size]
  const int64_t* sizes;    // [lists] postings of each list in all segments
  const Segment* segment;
  int64_t documents;
};

struct Settings {
  int32_t nprobe, bound, impute, kth, k;
  int32_t keep;   // raise similarities below the imputed one to it instead of dropping them
  int32_t plain;  // no vector instructions, for tests
  int64_t t_prime;  // t': cumulative list size at which the imputed centroid is taken
};

namespace {

// Value of a document. It is valid only if `when` is the current clock, so that nothing is cleared between queries.
struct Score {
  int32_t when;
  float value;
};

struct Scratch {
  std::vector<Score> best, sum;  // [documents] best similarity to the query token; sum over the query
  std::vector<int32_t> rows, found, touched;
  std::vector<std::vector<uint64_t>> near;  // [tokens] keys of the nearest lists, best first
  std::vector<float> scores, kept, table, sample, least;
  std::vector<int8_t> small;
  int32_t clock = 0;
};

// Query token in the form in which it is multiplied with codes.
struct Token {
  const int8_t* small;  // [dimension] q s in 8 bits; SQ4: even dimensions, then odd ones
  const float* table;   // [groups, 256] inner products with the codebooks
  const float* plain;   // [dimension] the query vector
  float scale, base;
};

float half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  uint32_t word;
  if (exponent == 0) {
    const float value = fraction * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -value : value;
  }
  word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

int32_t product4(const uint8_t* code, const int8_t* q, int half_dimension) {
  int32_t sum = 0;
  for (int j = 0; j < half_dimension; ++j) sum += (code[j] & 15) * q[j] + (code[j] >> 4) * q[half_dimension + j];
  return sum;
}

int32_t product8(const uint8_t* code, const int8_t* q, int dimension) {
  int32_t sum = 0;
  for (int j = 0; j < dimension; ++j) sum += code[j] * q[j];
  return sum;
}

float product16(const uint8_t* code, const float* q, int dimension) {
  float sum = 0;
  for (int j = 0; j < dimension; ++j) {
    uint16_t bits;
    std::memcpy(&bits, code + 2 * j, 2);
    sum += half(bits) * q[j];
  }
  return sum;
}

// Inner products with codes of n bytes, two dimensions per byte; n is a multiple of WIDEST4 or FAST4.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

int32_t widest4(const uint8_t* code, const int8_t* q, int n) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i sum = _mm512_setzero_si512();
  for (int j = 0; j < n; j += 64) {
    const __m512i x = _mm512_loadu_si512(code + j);
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(x, low), _mm512_loadu_si512(q + j));
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(x, 4), low), _mm512_loadu_si512(q + n + j));
  }
  return _mm512_reduce_add_epi32(sum);
}
#define WIDEST4 64
#endif

#if defined(__AVX2__)

int32_t total(__m256i x) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

int32_t fast4(const uint8_t* code, const int8_t* q, int n) {
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  for (int j = 0; j < n; j += 32) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)(code + j));
    const __m256i even = _mm256_loadu_si256((const __m256i*)(q + j)), odd = _mm256_loadu_si256((const __m256i*)(q + n + j));
    // Two summands of at most 2 * 15 * 127 each fit 16 bits.
    const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(x, low), even),
                                          _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(x, 4), low), odd));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(both, one));
  }
  return total(sum);
}
#define FAST4 32

// Four rows at once, which share the horizontal sum.
__m128i four4(const uint8_t* code, const int8_t* q, int n) {
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256i sum[4] = {};
  for (int begin = 0; begin < n; begin += 128) {
    __m256i small[4] = {};
    const int end = std::min(n, begin + 128);  // four iterations of fast4 fit 16 bits
    for (int j = begin; j < end; j += 32) {
      const __m256i even = _mm256_loadu_si256((const __m256i*)(q + j)), odd = _mm256_loadu_si256((const __m256i*)(q + n + j));
      for (int r = 0; r < 4; ++r) {
        const __m256i x = _mm256_loadu_si256((const __m256i*)(code + (int64_t)r * n + j));
        small[r] = _mm256_add_epi16(small[r], _mm256_maddubs_epi16(_mm256_and_si256(x, low), even));
        small[r] = _mm256_add_epi16(small[r], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(x, 4), low), odd));
      }
    }
    for (int r = 0; r < 4; ++r) sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(small[r], one));
  }
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
#define FOUR4 32

int32_t fast8(const uint8_t* code, const int8_t* q, int n) {
  __m256i sum = _mm256_setzero_si256();
  for (int j = 0; j < n; j += 16) {  // in 16 bits: the sum of two products of bytes would saturate in maddubs
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(code + j)));
    const __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(q + j)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
  }
  return total(sum);
}
#define FAST8 16

#elif defined(__ARM_NEON)

int32_t fast4(const uint8_t* code, const int8_t* q, int n) {
  const uint8x16_t low = vdupq_n_u8(15);
  int32x4_t sum = vdupq_n_s32(0);
  for (int j = 0; j < n; j += 16) {
    const uint8x16_t x = vld1q_u8(code + j);
    const int8x16_t even = vreinterpretq_s8_u8(vandq_u8(x, low)), odd = vreinterpretq_s8_u8(vshrq_n_u8(x, 4));
    const int8x16_t p = vld1q_s8(q + j), r = vld1q_s8(q + n + j);
    int16x8_t both = vmull_s8(vget_low_s8(even), vget_low_s8(p));
    both = vmlal_s8(both, vget_high_s8(even), vget_high_s8(p));
    both = vmlal_s8(both, vget_low_s8(odd), vget_low_s8(r));
    both = vmlal_s8(both, vget_high_s8(odd), vget_high_s8(r));
    sum = vpadalq_s16(sum, both);
  }
  return vaddvq_s32(sum);
}
#define FAST4 16

#endif

// Similarities of one query token and the codes of a list; `near` is its similarity to their centroid.
void score(const Index& index, const Token& token, const uint8_t* codes, int64_t rows, float near, bool plain, float* out) {
  const int d = index.dimension, size = index.code_size;
  const float base = token.base + near;
  if (index.codec == SQ4) {
#ifdef WIDEST4
    if (!plain && d / 2 % WIDEST4 == 0) {
      for (int64_t i = 0; i < rows; ++i) out[i] = base + token.scale * widest4(codes + i * size, token.small, d / 2);
      return;
    }
#endif
#ifdef FAST4
    if (!plain && d / 2 % FAST4 == 0) {
      int64_t i = 0;
#ifdef FOUR4
      for (; i + 4 <= rows; i += 4) {
        const __m128 products = _mm_cvtepi32_ps(four4(codes + i * size, token.small, d / 2));
        _mm_storeu_ps(out + i, _mm_add_ps(_mm_mul_ps(products, _mm_set1_ps(token.scale)), _mm_set1_ps(base)));
      }
#endif
      for (; i < rows; ++i) out[i] = base + token.scale * fast4(codes + i * size, token.small, d / 2);
      return;
    }
#endif
    for (int64_t i = 0; i < rows; ++i) out[i] = base + token.scale * product4(codes + i * size, token.small, d / 2);
  } else if (index.codec == SQ8) {
#ifdef FAST8
    if (!plain && d % FAST8 == 0) {
      for (int64_t i = 0; i < rows; ++i) out[i] = base + token.scale * fast8(codes + i * size, token.small, d);
      return;
    }
#endif
    for (int64_t i = 0; i < rows; ++i) out[i] = base + token.scale * product8(codes + i * size, token.small, d);
  } else if (index.codec == HALF) {
#if defined(__F16C__) && defined(__AVX2__) && defined(__FMA__)
    if (!plain && d % 8 == 0) {
      for (int64_t i = 0; i < rows; ++i) {
        __m256 sum = _mm256_setzero_ps();
        for (int j = 0; j < d; j += 8)
          sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(codes + i * size + 2 * j))),
                                _mm256_loadu_ps(token.plain + j), sum);
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, sum);
        out[i] = base + ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
      }
      return;
    }
#endif
    for (int64_t i = 0; i < rows; ++i) out[i] = base + product16(codes + i * size, token.plain, d);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* code = codes + i * size;
      float a = 0, b = 0;
      int g = 0;
      for (; g + 2 <= index.groups; g += 2) {
        a += token.table[g * 256 + code[g]];
        b += token.table[(g + 1) * 256 + code[g + 1]];
      }
      if (g < index.groups) a += token.table[g * 256 + code[g]];
      float sum = a + b;
      if (index.factored) {
        uint16_t bits;
        std::memcpy(&bits, code + index.groups, 2);
        sum *= half(bits);
      }
      out[i] = base + sum;
    }
  }
}

Token prepare(const Index& index, const float* q, Scratch& s) {
  const int d = index.dimension;
  Token token{nullptr, nullptr, q, 0, 0};
  if (index.codec == SQ4 || index.codec == SQ8) {
    float largest = 1e-12f;
    s.kept.resize(d);
    for (int j = 0; j < d; ++j) {
      s.kept[j] = q[j] * index.step[j];
      token.base += q[j] * index.low[j];
      largest = std::max(largest, std::fabs(s.kept[j]));
    }
    token.scale = largest / 127;
    s.small.resize(d);
    for (int j = 0; j < d; ++j) {
      const int at = index.codec == SQ8 ? j : (j % 2) * (d / 2) + j / 2;
      s.small[at] = (int8_t)std::lrintf(s.kept[j] * (127 / largest));
    }
    token.small = s.small.data();
  } else if (index.codec == TABLE) {
    s.table.resize((size_t)index.groups * 256);
    for (int g = 0; g < index.groups; ++g)
      for (int c = 0; c < 256; ++c) {
        const float* book = index.codebooks + ((size_t)g * 256 + c) * index.group_size;
        float sum = 0;
        for (int j = 0; j < index.group_size; ++j) sum += q[g * index.group_size + j] * book[j];
        s.table[g * 256 + c] = sum;
      }
    token.table = s.table.data();
  }
  return token;
}

// Map a score to an integer of the same order, so that one comparison sorts by score and then by list.
uint64_t key(float score, int list) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (uint32_t)list;
}

int list_of(uint64_t key) { return (int)(uint32_t)key; }

// Keep the `wanted` largest keys, sorted in descending order.
void cut(std::vector<uint64_t>& keys, int wanted) {
  if ((int)keys.size() > wanted) {
    std::nth_element(keys.begin(), keys.begin() + wanted, keys.end(), std::greater<uint64_t>());
    keys.resize(wanted);
  }
  std::sort(keys.begin(), keys.end(), std::greater<uint64_t>());
}

// Find the `wanted` nearest lists of one token among all lists.
void nearest_of(const float* near, int lists, int tokens, int t, int wanted, Scratch& s) {
  s.near[t].clear();
  for (int i = 0; i < lists; ++i) s.near[t].push_back(key(near[(int64_t)i * tokens + t], i));
  cut(s.near[t], wanted);
}

// Find the `wanted` nearest lists of each token, best first, in s.near. A threshold that slightly more lists exceed is
// estimated from a sample, so that only few lists are sorted.
void nearest(const float* near, int lists, int tokens, int wanted, Scratch& s) {
  const int stride = 16;
  if ((int)s.near.size() < tokens) s.near.resize(tokens);
  if (lists <= 64 * stride || wanted * 4 >= lists) {
    for (int t = 0; t < tokens; ++t) nearest_of(near, lists, tokens, t, wanted, s);
    return;
  }
  s.least.resize(tokens);
  for (int t = 0; t < tokens; ++t) {
    s.near[t].clear();
    s.sample.clear();
    for (int64_t i = 0; i < lists; i += stride) s.sample.push_back(near[i * tokens + t]);
    const int at = std::min<int>(s.sample.size() - 1, (int)(1.4f * wanted / stride) + 6);
    std::nth_element(s.sample.begin(), s.sample.begin() + at, s.sample.end(), std::greater<float>());
    s.least[t] = s.sample[at];
  }
  const float* least = s.least.data();
  for (int i = 0; i < lists; ++i) {
    const float* row = near + (int64_t)i * tokens;
    int t = 0;
    for (; t + 8 <= tokens; t += 8) {
      int any = 0;
      for (int j = 0; j < 8; ++j) any |= row[t + j] >= least[t + j];
      if (!any) continue;
      for (int j = t; j < t + 8; ++j)
        if (row[j] >= least[j]) s.near[j].push_back(key(row[j], i));
    }
    for (; t < tokens; ++t)
      if (row[t] >= least[t]) s.near[t].push_back(key(row[t], i));
  }
  for (int t = 0; t < tokens; ++t) {
    if ((int)s.near[t].size() < wanted) nearest_of(near, lists, tokens, t, wanted, s);
    else cut(s.near[t], wanted);
  }
}

// Return the list at which the cumulative list size reaches `t_prime` (t'), or the last one in `near`.
int list_at_t_prime(const Index& x, const std::vector<uint64_t>& near, int64_t t_prime, bool& reached) {
  int64_t passed = 0;
  for (uint64_t k : near)
    if ((passed += x.sizes[list_of(k)]) >= t_prime) {
      reached = true;
      return list_of(k);
    }
  reached = false;
  return list_of(near.back());
}

bool allowed(const uint8_t* bits, int32_t document) { return !bits || (bits[document >> 3] >> (document & 7) & 1); }

}  // namespace

// Write the best documents and their scores, the means over query tokens, best first; return their number, at most k.
// `near` is [lists, tokens], the inner products of centroids and query tokens; `allow` is a bitmap of documents or null.
// If `trace` is not null, `trace` [tokens] gets the similarity of document `traced` to each query token, NaN where it
// is imputed, and `imputed` [tokens] gets the imputed similarity.
extern "C" int token_search(const Index* index, const float* query, const float* near, int tokens, const Settings* set,
                            const uint8_t* allow, int32_t* documents, float* scores, int32_t traced, float* trace,
                            float* imputed) {
  static thread_local Scratch mine;
  Scratch& s = mine;  // one look-up of the thread-local variable
  const Index& x = *index;
  if ((int64_t)s.best.size() < x.documents || s.clock > INT32_MAX - tokens - 2) {
    s.best.assign(x.documents, Score{0, 0});
    s.sum.assign(x.documents, Score{0, 0});
    s.touched.resize(x.documents + 1);  // one spare entry: entries are written before they count
    s.clock = 0;
  }
  const int32_t this_query = ++s.clock;
  const int nprobe = std::min(set->nprobe, x.lists);
  const int bound = std::min(std::max(set->bound, nprobe), x.lists);
  int wanted = nprobe;
  if (set->impute == WARP) {  // usually enough lists to hold `t_prime` tokens, even short ones
    int64_t all = 0;
    for (int i = 0; i < x.lists; ++i) all += x.sizes[i];
    wanted = (int)std::min<int64_t>(bound, std::max<int64_t>(nprobe, 8 + 2 * set->t_prime * x.lists / std::max<int64_t>(all, 1)));
  }
  nearest(near, x.lists, tokens, wanted, s);
  int64_t touched = 0;
  float total = 0;
  for (int t = 0; t < tokens; ++t) {
    std::vector<uint64_t>& lists = s.near[t];
    const auto product = [&](int list) { return near[(int64_t)list * tokens + t]; };
    const Token token = prepare(x, query + (int64_t)t * x.dimension, s);

    float missing = 0;
    if (set->impute == WARP && wanted) {
      bool reached;
      int last = list_at_t_prime(x, lists, set->t_prime, reached);
      if (!reached && wanted < bound) {
        nearest_of(near, x.lists, tokens, t, bound, s);
        last = list_at_t_prime(x, lists, set->t_prime, reached);
      }
      missing = product(last);
    }

    int64_t room = 0;
    for (int p = 0; p < nprobe; ++p) room += x.sizes[list_of(lists[p])];
    if ((int64_t)s.scores.size() < room + 1) {
      s.scores.resize(room + 1);
      s.rows.resize(room + 1);
      s.found.resize(room + 1);
    }
    int64_t at = 0;
    for (int p = 0; p < nprobe; ++p) {
      const int list = list_of(lists[p]);
      for (int g = 0; g < x.segments; ++g) {
        const Segment& segment = x.segment[g];
        const int64_t start = segment.starts[list], rows = segment.starts[list + 1] - start;
        if (!rows) continue;
        score(x, token, segment.codes + start * x.code_size, rows, product(list), set->plain, s.scores.data() + at);
        at += rows;
      }
    }

    if (set->impute == KPRIME) {
      s.kept.clear();
      int64_t i = 0;
      for (int p = 0; p < nprobe; ++p)
        for (int g = 0; g < x.segments; ++g) {
          const Segment& segment = x.segment[g];
          const int list = list_of(lists[p]);
          for (int64_t r = segment.starts[list]; r < segment.starts[list + 1]; ++r, ++i)
            if (allowed(allow, segment.documents[r])) s.kept.push_back(s.scores[i]);
        }
      if ((int64_t)s.kept.size() > set->kth) {
        std::nth_element(s.kept.begin(), s.kept.begin() + (set->kth - 1), s.kept.end(), std::greater<float>());
        missing = s.kept[set->kth - 1];
      } else {
        missing = s.kept.empty() ? 0 : *std::min_element(s.kept.begin(), s.kept.end());
      }
    }

    // The loops below have no data-dependent branches, half of which would be mispredicted.
    const float least = set->impute == NOTHING || set->keep ? -INFINITY : missing;
    const float raised = set->impute == NOTHING ? -INFINITY : missing;
    int64_t passing = 0, i = 0;
    for (int p = 0; p < nprobe; ++p)
      for (int g = 0; g < x.segments; ++g) {
        const Segment& segment = x.segment[g];
        const int list = list_of(lists[p]);
        for (int64_t r = segment.starts[list]; r < segment.starts[list + 1]; ++r, ++i) {
          const float value = s.scores[i];
          s.rows[passing] = segment.documents[r];
          s.scores[passing] = std::max(value, raised);
          passing += value >= least && allowed(allow, segment.documents[r]);
        }
      }
    const int32_t now = ++s.clock;
    int64_t found = 0;
    for (i = 0; i < passing; ++i) {
      Score& best = s.best[s.rows[i]];
      const bool first = best.when != now;
      best.value = std::max(first ? -INFINITY : best.value, s.scores[i]);
      best.when = now;
      s.found[found] = s.rows[i];
      found += first;
    }
    total += missing;
    for (i = 0; i < found; ++i) {
      Score& sum = s.sum[s.found[i]];
      const bool first = sum.when != this_query;
      sum.value = (first ? 0 : sum.value) + (s.best[s.found[i]].value - missing);
      sum.when = this_query;
      s.touched[touched] = s.found[i];
      touched += first;
    }
    if (trace) {
      trace[t] = s.best[traced].when == now ? s.best[traced].value : NAN;
      imputed[t] = missing;
    }
  }

  // Compare means, not sums: they are the scores, so ties are broken by doc id whatever the sums were rounded to.
  for (int64_t i = 0; i < touched; ++i) {
    float& value = s.sum[s.touched[i]].value;
    value = (value + total) / tokens;
  }
  const int k = std::min<int64_t>(set->k, touched);
  const auto better = [&](int32_t a, int32_t b) {
    const float p = s.sum[a].value, q = s.sum[b].value;
    return p != q ? p > q : a < b;
  };
  std::partial_sort(s.touched.begin(), s.touched.begin() + k, s.touched.begin() + touched, better);
  for (int i = 0; i < k; ++i) {
    documents[i] = s.touched[i];
    scores[i] = s.sum[s.touched[i]].value;
  }
  return k;
}
