// Attention of one new token over the keys and values of its sequence.
//
// Knows one K/V head at a time: its cached rows are read once for up to four query heads. Knows nothing of
// pages or masks: the caller hands it the positions that the token sees.
#pragma once
#include "blocks.h"
#include "home.h"

namespace {

constexpr int QUERIES = 4;  // query heads that share each load of a cached row

INLINE int64_t score_count(int64_t length) { return (QUERIES * length + LANES - 1) / LANES * LANES; }

// For each query head i of four: lanes j with j % 4 == i, folded.
template <class Fold>
INLINE void fold_queries(vf lanes, float* out, Fold fold) {
    for (int i = 0; i < QUERIES; i++) {
        float value = lanes[i];
        for (int j = i + QUERIES; j < LANES; j += QUERIES) value = fold(value, lanes[j]);
        out[i] = value;
    }
}

INLINE vf repeat_queries(const float* values) {
    vf lanes;
    for (int j = 0; j < LANES; j++) lanes[j] = values[j % QUERIES];
    return lanes;
}

template <class W>
INLINE vf cached(const uint8_t* row, int64_t at) {
    return W::decode(row + at / LANES * W::bytes);
}

// out[i] (head_dim) for four queries q[i] (head_dim); `scores` holds score_count(length) floats, four for
// each position.
template <class W>
void attend(const shoal::Cache& c, int64_t kv_head, const float* const* q, float* const* out, float* scores) {
    const uint8_t* keys = static_cast<const uint8_t*>(c.keys) + kv_head * c.key_head_bytes;
    const uint8_t* values = static_cast<const uint8_t*>(c.values) + kv_head * c.value_head_bytes;
    const int64_t count = score_count(c.length);
    for (int64_t p = 0; p < c.length; p++) {
        vf acc[QUERIES] = {};
        for (int64_t d = 0; d < c.head_dim; d += LANES) {
            const vf key = cached<W>(keys + p * c.key_bytes, d);
            for (int i = 0; i < QUERIES; i++) acc[i] = fma(key, load(q[i] + d), acc[i]);
        }
        const vf4 sums = sum4(acc[0], acc[1], acc[2], acc[3]) * c.scale;
        memcpy(scores + QUERIES * p, &sums, sizeof sums);
    }
    for (int64_t s = QUERIES * c.length; s < count; s++) scores[s] = -__builtin_inff();

    vf most = load(scores), total = {};
    for (int64_t s = LANES; s < count; s += LANES) most = max(most, load(scores + s));
    float peak[QUERIES], sum[QUERIES];
    fold_queries(most, peak, [](float a, float b) { return a > b ? a : b; });
    const vf peaks = repeat_queries(peak);
    for (int64_t s = 0; s < count; s += LANES) {
        const vf weight = exp(load(scores + s) - peaks);
        store(scores + s, weight);
        total = total + weight;
    }
    fold_queries(total, sum, [](float a, float b) { return a + b; });

    for (int64_t d = 0; d < c.head_dim; d += LANES) {
        vf acc[QUERIES] = {};
        for (int64_t p = 0; p < c.length; p++) {
            const vf value = cached<W>(values + p * c.value_bytes, d);
            for (int i = 0; i < QUERIES; i++) acc[i] = fma(splat(scores[QUERIES * p + i]), value, acc[i]);
        }
        for (int i = 0; i < QUERIES; i++) store(out[i] + d, acc[i] / splat(sum[i]));
    }
}

struct Attention {
    const shoal::Cache& cache;
    const float* q;
    float* out;
    float* scratch;
    int64_t scratch_stride;
    void (*attend)(const shoal::Cache&, int64_t, const float* const*, float* const*, float*);
};

// A job is one K/V head and all query heads that look at it.
void attention_job(const void* context, int64_t kv_head, int worker) {
    const Attention& a = *static_cast<const Attention*>(context);
    const int64_t group = a.cache.heads / a.cache.kv_heads, dim = a.cache.head_dim;
    for (int64_t first = 0; first < group; first += QUERIES) {
        const float* q[QUERIES];
        float* out[QUERIES];
        for (int64_t i = 0; i < QUERIES; i++) {  // where the group has fewer, its last head again
            const int64_t head = kv_head * group + (first + i < group ? first + i : group - 1);
            q[i] = a.q + head * dim;
            out[i] = a.out + head * dim;
        }
        a.attend(a.cache, kv_head, q, out, a.scratch + worker * a.scratch_stride);
    }
}

shoal::Status attention(const shoal::Cache& cache, const float* q, float* out) {
    if (cache.head_dim % LANES) return shoal::BAD_TYPE;
    Attention a{cache, q, out, nullptr, score_count(cache.length), nullptr};
    if (cache.type == 0) a.attend = attend<F32>;
    if (cache.type == 1) a.attend = attend<F16>;
    if (cache.type == 30) a.attend = attend<BF16>;
    if (!a.attend) return shoal::BAD_TYPE;
    shoal::Turn turn;
    a.scratch = static_cast<float*>(turn.reserve((size_t)(turn.threads() * a.scratch_stride) * sizeof(float)));
    if (!a.scratch) return shoal::NO_MEMORY;
    turn.run(cache.kv_heads, 2 * cache.heads * cache.length * cache.head_dim, attention_job, &a);
    return shoal::OK;
}

}  // namespace
