// Float weights times float inputs: neither is rounded (but see `linear_bf16.h`).
//
// A dot product is LANES running sums over ascending columns, folded by `sum4`. One token widens rows as it goes,
// several multiply tiles that were widened before; both compute exactly that, so batching, threads and tiling change no
// bit.
#pragma once
#include "ahead.h"
#include "blocks.h"
#include "product.h"

namespace {

constexpr int ROWS = 4;                   // rows that share each load of x
constexpr int64_t AHEAD_BYTES = 16 << 10;  // that weights are asked for before they are used

// Running sums of four rows and one token.
struct Sums {
    vf rows[ROWS];
};

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
    // Rows lie one behind the other, and are asked for in that order: only so does a processor fetch by itself what comes.
    const uint8_t* ahead = w + AHEAD_BYTES;
    for (int64_t k = 0; k < whole; k += LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++, ahead += W::bytes) {
            const uint8_t* at = w + r * row_bytes + k / LANES * W::bytes;
            __builtin_prefetch(ahead);
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
INLINE const uint8_t* float_row(const shoal::Weights& w, int64_t row) {
    return static_cast<const uint8_t*>(w.data) + row * (w.cols * W::bytes / LANES);
}

template <class W>
void few_tokens_float(const shoal::Weights& w, int64_t row0, int64_t rows, const Tokens& x, const Output& y) {
    const int64_t row_bytes = w.cols * W::bytes / LANES;
    const uint8_t* row = float_row<W>(w, row0);
    for (int64_t r = 0; r < rows; r += ROWS, row += ROWS * row_bytes) {
        for (int64_t t = 0; t < x.count; t++) {
            const float* in = reinterpret_cast<const float*>(x.packed[t]);
            float* out = y.row(t) + r;
            vf s[ROWS];
            if (rows - r >= ROWS) {
                dot_float<W, ROWS>(row, row_bytes, in, w.cols, s);
                const vf4 sums = sum4(s[0], s[1], s[2], s[3]);
                memcpy(out, &sums, sizeof sums);
                continue;
            }
            for (int64_t i = 0; i < rows - r; i++) {
                dot_float<W, 1>(row + i * row_bytes, row_bytes, in, w.cols, s);
                out[i] = sum4(s[0], vf{}, vf{}, vf{})[0];
            }
        }
    }
}

template <class W>
void decode_float(const shoal::Weights& w, int64_t row, float* out) {
    widen_row<W>(float_row<W>(w, row), w.cols, [&](int64_t k, vf v) INLINE_LAMBDA {
        memcpy(out + k, &v, (size_t)least<int64_t>(LANES, w.cols - k) * sizeof(float));
    });
}

// Widened rows lie STRIDE floats apart: no power of two, or they would compete for cache lines.
constexpr int64_t FLOAT_CHUNK = LANES == 8 ? 512 : 1024;  // columns widened at once, beside which inputs have room
constexpr int64_t STRIDE = FLOAT_CHUNK + LANES;

// Adds to the running sums of four widened rows and T tokens, which are zero at first.
template <int T>
void multiply_floats(const float* w, const float* const* x, int64_t cols, bool first, Sums* sums) {
    vf acc[T][ROWS];  // copied one by one: what is copied at once goes through memory, slowly
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        for (int r = 0; r < ROWS; r++) acc[t][r] = first ? vf{} : sums[t].rows[r];
    }
    for (int64_t k = 0; k < cols; k += LANES) {
        vf v[ROWS];
        for (int r = 0; r < ROWS; r++) v[r] = load(w + r * STRIDE + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const vf in = load(x[t] + k);
            for (int r = 0; r < ROWS; r++) acc[t][r] = fma(v[r], in, acc[t][r]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        for (int r = 0; r < ROWS; r++) sums[t].rows[r] = acc[t][r];
    }
}

using MultiplyFloats = void (*)(const float*, const float* const*, int64_t, bool, Sums*);

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

// Weights that are widened next, asked for while others are multiplied: from memory they come as slowly as some tokens
// are multiplied by them.
struct Coming {
    const uint8_t* from;
    int64_t row_bytes, bytes;  // from row to row; of each

    // The part `i` of `parts` of ROWS rows.
    INLINE void fetch(int64_t i, int64_t parts) const {
        const int64_t lines = ceil_div(bytes, LINE);
        for (int64_t line = lines * i / parts; line < lines * (i + 1) / parts; line++) {
            for (int r = 0; r < ROWS; r++) fetch_line(from + r * row_bytes + line * LINE);
        }
    }
};

template <class W>
void many_tokens_float(const shoal::Weights& w, int64_t row0, int64_t rows, const Tokens& x, const Output& y,
                       char* memory) {
    FloatScratch& scratch = *reinterpret_cast<FloatScratch*>(memory);
    const int64_t batches = ceil_div(x.count, TOKENS), row_bytes = w.cols * W::bytes / LANES;
    for (int64_t k = 0; k < w.cols; k += FLOAT_CHUNK) {
        const int64_t cols = least(FLOAT_CHUNK, w.cols - k);
        for (int64_t r = 0; r < rows; r += ROWS) {
            const bool below = r + ROWS < rows;  // else the first rows are next, with further columns
            const int64_t ahead = below ? k : k + cols;
            const Coming next{float_row<W>(w, row0 + (below ? r + ROWS : 0)) + ahead / LANES * W::bytes, row_bytes,
                              least(FLOAT_CHUNK, w.cols - ahead) * W::bytes / LANES};
            for (int64_t i = 0; i < ROWS; i++) {  // after the last row that one again, for sums nobody reads
                const uint8_t* row = float_row<W>(w, row0 + least(r + i, rows - 1)) + k / LANES * W::bytes;
                float* out = scratch.rows + i * STRIDE;
                widen_row<W>(row, cols, [&](int64_t at, vf v) INLINE_LAMBDA { store(out + at, v); });
            }
            for (int64_t i = 0; i < batches; i++) {
                next.fetch(i, batches);
                const int64_t from = x.count * i / batches, until = x.count * (i + 1) / batches;
                const float* in[TOKENS];
                for (int64_t t = from; t < until; t++) in[t - from] = reinterpret_cast<const float*>(x.packed[t]) + k;
                multiply_floats_of(until - from)(scratch.rows, in, cols, k == 0, scratch.sums[r / ROWS] + from);
            }
        }
    }
    for (int64_t t = 0; t < x.count; t++) {
        for (int64_t r = 0; r < rows; r += ROWS) {
            const Sums& s = scratch.sums[r / ROWS][t];
            const vf4 sums = sum4(s.rows[0], s.rows[1], s.rows[2], s.rows[3]);
            memcpy(y.row(t) + r, &sums, (size_t)least<int64_t>(ROWS, rows - r) * sizeof(float));
        }
    }
}

template <class W>
constexpr Type float_type() {
    constexpr Multiply by{4, {FLOATS, FLOATS}, few_tokens_float<W>, many_tokens_float<W>, sizeof(FloatScratch)};
    return {false, 1, W::bytes / LANES, {by, by}, decode_float<W>};
}

}  // namespace
