// Float weights times float inputs: what a float matrix is multiplied with stays exact.
//
// A dot product is LANES running sums over ascending columns, folded by `sum4`; widening as it goes (one
// token) and multiplying widened tiles (several) do exactly that, so batching, threads and tiling change no bit.
#pragma once
#include "blocks.h"
#include "jobs.h"

namespace {

constexpr int ROWS = 4;  // rows that share each load of x

// Running sums of four rows and one token.
struct Sums {
    vf rows[ROWS];
};

size_t float_bytes(int64_t cols) { return (size_t)ceil_div(cols, 16) * 64; }

// Filled up with zeros to whole vectors.
void pack_floats(const float* x, int64_t cols, char* packed) {
    memcpy(packed, x, (size_t)cols * sizeof(float));
    memset(packed + cols * sizeof(float), 0, float_bytes(cols) - (size_t)cols * sizeof(float));
}

// `cols` weights from `from`, widened and filled up with zeros to whole vectors.
template <class W, class Sink>
INLINE void widen_row(const uint8_t* from, int64_t cols, Sink sink) {
    int64_t k = 0;
    for (; k + LANES <= cols; k += LANES, from += W::bytes) sink(k, W::decode(from));
    if (k < cols) {
        uint8_t tail[W::bytes] = {};
        memcpy(tail, from, (size_t)((cols - k) * W::bytes / LANES));
        sink(k, W::decode(tail));
    }
}

template <class W, int R>
INLINE void dot_float(const uint8_t* w, int64_t row_bytes, const float* x, int64_t cols, vf* sums) {
    vf acc[R] = {};
    const int64_t whole = cols / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const uint8_t* at = w + r * row_bytes + k / LANES * W::bytes;
            __builtin_prefetch(at + ROWS * row_bytes);
            acc[r] = fma(W::decode(at), load(x + k), acc[r]);
        }
    }
    if (whole < cols) {
        for (int r = 0; r < R; r++) {
            widen_row<W>(w + r * row_bytes + whole / LANES * W::bytes, cols - whole,
                         [&](int64_t, vf v) INLINE_LAMBDA { acc[r] = fma(v, load(x + whole), acc[r]); });
        }
    }
    for (int r = 0; r < R; r++) sums[r] = acc[r];
}

template <class W>
void dot_float_rows(const uint8_t* w, int64_t row_bytes, int64_t rows, const char* packed, int64_t cols, float* y) {
    const float* x = reinterpret_cast<const float*>(packed);
    for (; rows >= ROWS; rows -= ROWS, w += ROWS * row_bytes, y += ROWS) {
        vf s[ROWS];
        dot_float<W, ROWS>(w, row_bytes, x, cols, s);
        const vf4 sums = sum4(s[0], s[1], s[2], s[3]);
        memcpy(y, &sums, sizeof sums);
    }
    for (; rows > 0; rows--, w += row_bytes, y++) {
        vf s;
        dot_float<W, 1>(w, row_bytes, x, cols, &s);
        *y = sum4(s, vf{}, vf{}, vf{})[0];
    }
}

template <class W>
void decode_float_row(const uint8_t* w, int64_t cols, float* out) {
    widen_row<W>(w, cols, [&](int64_t k, vf v) INLINE_LAMBDA {
        memcpy(out + k, &v, (size_t)least<int64_t>(LANES, cols - k) * sizeof(float));
    });
}

// Widened rows lie STRIDE floats apart: no power of two, so that they do not compete for lines of a cache.
constexpr int64_t STRIDE = CHUNK + LANES;

// Adds to the running sums of four widened rows and T tokens, which are zero at first.
template <int T>
void multiply_floats(const float* w, const float* x, int64_t stride, int64_t cols, bool first, Sums* sums) {
    vf acc[T][ROWS] = {};
    if (!first) memcpy(acc, sums, sizeof acc);
    for (int64_t k = 0; k < cols; k += LANES) {
        vf v[ROWS];
        for (int r = 0; r < ROWS; r++) v[r] = load(w + r * STRIDE + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const vf in = load(x + t * stride + k);
            for (int r = 0; r < ROWS; r++) acc[t][r] = fma(v[r], in, acc[t][r]);
        }
    }
    memcpy(sums, acc, sizeof acc);
}

using MultiplyFloats = void (*)(const float*, const float*, int64_t, int64_t, bool, Sums*);

MultiplyFloats multiply_floats_of(int64_t tokens) {
    static constexpr MultiplyFloats all[] = {multiply_floats<1>, multiply_floats<2>, multiply_floats<3>,
                                             multiply_floats<4>, multiply_floats<5>, multiply_floats<6>};
    return all[tokens - 1];
}

// The widened rows stay in the first-level cache, the sums in the second.
struct alignas(64) FloatScratch {
    float rows[ROWS * STRIDE];
    Sums sums[TILE_ROWS / ROWS][TILE_TOKENS];
};

template <class W>
void tile_floats(const Linear& l, int64_t row0, int64_t rows, char* memory) {
    FloatScratch& scratch = *reinterpret_cast<FloatScratch*>(memory);
    const int64_t groups = ceil_div(l.tokens, TOKENS), stride = (int64_t)(l.packed_bytes / sizeof(float));
    for (int64_t k = 0; k < l.w.cols; k += CHUNK) {
        const int64_t cols = least(CHUNK, l.w.cols - k);
        const float* x = reinterpret_cast<const float*>(l.packed) + k;
        for (int64_t r = 0; r < rows; r += ROWS) {
            for (int64_t i = 0; i < ROWS; i++) {  // beyond the last row: that row again, for sums nobody reads
                const uint8_t* row = l.row(row0 + least(r + i, rows - 1)) + k / LANES * W::bytes;
                float* out = scratch.rows + i * STRIDE;
                widen_row<W>(row, cols, [&](int64_t at, vf v) INLINE_LAMBDA { store(out + at, v); });
            }
            for (int64_t g = 0; g < groups; g++) {
                const int64_t from = l.tokens * g / groups, until = l.tokens * (g + 1) / groups;
                Sums* sums = scratch.sums[r / ROWS] + from;
                multiply_floats_of(until - from)(scratch.rows, x + from * stride, stride, cols, k == 0, sums);
            }
        }
    }
    for (int64_t t = 0; t < l.tokens; t++) {
        for (int64_t r = 0; r < rows; r += ROWS) {
            const Sums& s = scratch.sums[r / ROWS][t];
            const vf4 sums = sum4(s.rows[0], s.rows[1], s.rows[2], s.rows[3]);
            memcpy(l.output(t) + row0 + r, &sums, (size_t)least<int64_t>(ROWS, rows - r) * sizeof(float));
        }
    }
}

template <class W>
constexpr Type float_type() {
    return {float_bytes,    pack_floats,          dot_float_rows<W>,
            tile_floats<W>, sizeof(FloatScratch), decode_float_row<W>};
}

}  // namespace
