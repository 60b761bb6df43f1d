// Sums that have the same bits on every machine: norms, and the scores by which tokens choose experts.
//
// Ranks of a group have the same hidden states to the bit and must choose the same experts, whatever their machines: a
// near tie that two of them broke differently would be a wrong sum that nobody notices. So there are always STRANDS
// running sums over ascending columns, however wide vectors are; products are rounded before they are added (no fused
// multiply-add); and strands are folded in one order. `fixed_order.py` does the same in NumPy.
#pragma once
#include "blocks.h"
#include "product.h"

namespace {

constexpr int STRANDS = 16;
constexpr int STRAND_PARTS = STRANDS / LANES;

struct Strands {
    vf parts[STRAND_PARTS];
};

INLINE float folded(const Strands& s) {
    float lanes[STRANDS];
    memcpy(lanes, s.parts, sizeof lanes);
    for (int i = STRANDS / 2; i > 0; i /= 2) {
        for (int j = 0; j < i; j++) lanes[j] = lanes[j] + lanes[j + i];
    }
    return lanes[0];
}

INLINE float sum_of_squares(const float* x, int64_t cols) {
    const int64_t whole = cols / STRANDS * STRANDS;
    Strands sums = {};
    for (int64_t k = 0; k < whole; k += STRANDS) {
        for (int p = 0; p < STRAND_PARTS; p++) {
            const vf v = load(x + k + p * LANES);
            sums.parts[p] = sums.parts[p] + v * v;
        }
    }
    if (whole < cols) {
        float rest[STRANDS] = {};
        memcpy(rest, x + whole, (size_t)(cols - whole) * sizeof(float));
        for (int p = 0; p < STRAND_PARTS; p++) {
            const vf v = load(rest + p * LANES);
            sums.parts[p] = sums.parts[p] + v * v;
        }
    }
    return folded(sums);
}

// R rows of a float type times T tokens. The rows are `row_bytes` apart, the tokens (T, cols) and results `stride`.
template <class W, int R, int T>
INLINE void dot_strands(const uint8_t* w, int64_t row_bytes, const float* x, int64_t cols, float* y, int64_t stride) {
    const int64_t whole = cols / STRANDS * STRANDS;
    Strands sums[R][T] = {};
    for (int64_t k = 0; k < whole; k += STRANDS) {
#pragma GCC unroll 4
        for (int p = 0; p < STRAND_PARTS; p++) {
            vf in[T];
            for (int t = 0; t < T; t++) in[t] = load(x + t * cols + k + p * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vf v = W::decode(w + r * row_bytes + (k / LANES + p) * W::bytes);
                for (int t = 0; t < T; t++) sums[r][t].parts[p] = sums[r][t].parts[p] + v * in[t];
            }
        }
    }
    if (whole < cols) {
        float in[T][STRANDS] = {};
        for (int t = 0; t < T; t++) memcpy(in[t], x + t * cols + whole, (size_t)(cols - whole) * sizeof(float));
        for (int r = 0; r < R; r++) {
            uint8_t rest[STRAND_PARTS * W::bytes] = {};
            memcpy(rest, w + r * row_bytes + whole / LANES * W::bytes, (size_t)((cols - whole) * W::bytes / LANES));
            for (int p = 0; p < STRAND_PARTS; p++) {
                const vf v = W::decode(rest + p * W::bytes);
                for (int t = 0; t < T; t++) sums[r][t].parts[p] = sums[r][t].parts[p] + v * load(in[t] + p * LANES);
            }
        }
    }
    for (int t = 0; t < T; t++) {
        for (int r = 0; r < R; r++) y[t * stride + r] = folded(sums[r][t]);
    }
}

// Rows and tokens that are multiplied together, so that the sums fit into the registers.
constexpr int SCORE_ROWS = LANES == 16 ? 4 : 2;
constexpr int SCORE_TOKENS = LANES == 16 ? 4 : LANES == 8 ? 2 : 1;
constexpr int SINGLE_ROWS = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;

template <class W, int R, int T>
INLINE void score_rows(const uint8_t* w, int64_t row_bytes, int64_t rows, const float* x, int64_t cols, float* y,
                       int64_t stride) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) dot_strands<W, R, T>(w + r * row_bytes, row_bytes, x, cols, y + r, stride);
    for (; r < rows; r++) dot_strands<W, 1, T>(w + r * row_bytes, row_bytes, x, cols, y + r, stride);
}

// `rows` rows of a float type, `row_bytes` apart, times x (tokens, cols): y (tokens, rows), `stride` apart.
template <class W>
void scores_of(const uint8_t* w, int64_t row_bytes, int64_t rows, const float* x, int64_t tokens, int64_t cols, float* y,
               int64_t stride) {
    int64_t t = 0;
    for (; t + SCORE_TOKENS <= tokens && SCORE_TOKENS > 1; t += SCORE_TOKENS) {
        score_rows<W, SCORE_ROWS, SCORE_TOKENS>(w, row_bytes, rows, x + t * cols, cols, y + t * stride, stride);
    }
    for (; t < tokens; t++) score_rows<W, SINGLE_ROWS, 1>(w, row_bytes, rows, x + t * cols, cols, y + t * stride, stride);
}

using ScoresOf = void (*)(const uint8_t*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);

struct Scores {
    const shoal::Linear& router;
    const Type& type;
    ScoresOf multiply;
    const float* x;
    int64_t tokens, row_jobs;
    float* y;
    char* scratch;  // one part for each thread, in which rows of a quantised type are decoded
    int64_t scratch_bytes;
};

constexpr int64_t SCORE_JOB_ROWS = 16, SCORE_JOB_TOKENS = 32;

void scores_job(const void* context, int64_t index, int worker) {
    const Scores& s = *static_cast<const Scores*>(context);
    const shoal::Weights& w = s.router.w;
    const int64_t row0 = index % s.row_jobs * SCORE_JOB_ROWS, rows = least(SCORE_JOB_ROWS, w.rows - row0);
    const int64_t token0 = index / s.row_jobs * SCORE_JOB_TOKENS, tokens = least(SCORE_JOB_TOKENS, s.tokens - token0);
    float* y = s.y + token0 * w.rows + row0;
    const float* x = s.x + token0 * w.cols;
    if (s.type.quantised) {
        float* decoded = reinterpret_cast<float*>(s.scratch + worker * s.scratch_bytes);
        for (int64_t r = 0; r < rows; r++) s.type.decode(w, row0 + r, decoded + r * w.cols);
        s.multiply(reinterpret_cast<uint8_t*>(decoded), w.cols * 4, rows, x, tokens, w.cols, y, w.rows);
    } else {
        const int64_t row_bytes = w.cols * s.type.block_bytes;
        s.multiply(static_cast<const uint8_t*>(w.data) + row0 * row_bytes, row_bytes, rows, x, tokens, w.cols, y, w.rows);
    }
    if (!s.router.bias) return;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t r = 0; r < rows; r++) y[t * w.rows + r] = y[t * w.rows + r] + s.router.bias[row0 + r];
    }
}

}  // namespace
