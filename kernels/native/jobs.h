// How a matrix product is cut into jobs, and what a weight type brings to it.
//
// Knows rows, tokens and the order of work; the two ways to multiply are in `linear_float.h` and
// `linear_int8.h`.
#pragma once
#include <string.h>

#include "home.h"
#include "simd.h"

namespace {

template <class T>
INLINE T least(T a, T b) {
    return a < b ? a : b;
}

template <class T>
INLINE T most(T a, T b) {
    return a > b ? a : b;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Linear;

// Inputs are packed before they are multiplied: copied, or quantised, one token after the other.
struct Type {
    size_t (*packed_bytes)(int64_t cols);  // of one token, a multiple of 64
    void (*pack)(const float* x, int64_t cols, char* packed);
    // One token: y[0..rows] of consecutive rows.
    void (*dot_rows)(const uint8_t* w, int64_t row_bytes, int64_t rows, const char* packed, int64_t cols, float* y);
    // Several tokens: l.y of l.tokens tokens and rows [row0, row0 + rows).
    void (*tile)(const Linear& l, int64_t row0, int64_t rows, char* scratch);
    size_t scratch_bytes;  // a thread's working memory for `tile`, a multiple of 64
    void (*decode_row)(const uint8_t* w, int64_t cols, float* out);
};

struct Linear {
    const shoal::Weights& w;
    const Type& type;
    const float* x;
    const float* bias;
    float* y;
    int64_t job_rows;
    // Of several tokens, those in hand:
    int64_t token0, tokens;
    size_t packed_bytes;  // of a token
    char* packed;
    char* scratch;  // a thread's part after the other

    const uint8_t* row(int64_t index) const { return static_cast<const uint8_t*>(w.data) + index * w.row_bytes; }
    const char* input(int64_t token) const { return packed + token * packed_bytes; }
    float* output(int64_t token) const { return y + (token0 + token) * w.rows; }
};

constexpr int64_t JOB_ROWS = 8;              // jobs take a multiple of this
constexpr int64_t DOT_JOB_BYTES = 32 << 10;  // of weights: some microseconds, so that threads end together
constexpr int64_t TILE_TOKENS = 96;          // unpacking a row costs as much as multiplying it with 5 tokens
constexpr int64_t TILE_ROWS = 64;            // inputs come from afar once for so many rows
constexpr int64_t CHUNK = 1024;              // columns unpacked at once, whole blocks of every type

void pack_job(const void* context, int64_t token, int) {
    const Linear& l = *static_cast<const Linear*>(context);
    l.type.pack(l.x + (l.token0 + token) * l.w.cols, l.w.cols, l.packed + token * l.packed_bytes);
}

void dot_job(const void* context, int64_t index, int) {
    const Linear& l = *static_cast<const Linear*>(context);
    const int64_t start = index * l.job_rows, rows = least(l.job_rows, l.w.rows - start);
    l.type.dot_rows(l.row(start), l.w.row_bytes, rows, l.packed, l.w.cols, l.y + start);
    if (l.bias) {
        for (int64_t r = start; r < start + rows; r++) l.y[r] += l.bias[r];
    }
}

void tile_job(const void* context, int64_t index, int worker) {
    const Linear& l = *static_cast<const Linear*>(context);
    const int64_t start = index * l.job_rows, rows = least(l.job_rows, l.w.rows - start);
    l.type.tile(l, start, rows, l.scratch + worker * l.type.scratch_bytes);
    if (l.bias) {
        for (int64_t t = 0; t < l.tokens; t++) {
            for (int64_t r = start; r < start + rows; r++) l.output(t)[r] += l.bias[r];
        }
    }
}

shoal::Status run_linear(Linear& l, int64_t tokens) {
    shoal::Turn turn;
    const int64_t share = ceil_div(l.w.rows, 4 * JOB_ROWS * turn.threads()) * JOB_ROWS;  // four jobs a thread
    const int64_t tiles = ceil_div(tokens, TILE_TOKENS), most = ceil_div(tokens, tiles);
    const size_t scratch_bytes = tokens == 1 ? 0 : turn.threads() * l.type.scratch_bytes;  // whole lines
    // A line more than needed: no power of two between tokens, so that they do not compete for lines of a cache.
    l.packed_bytes = l.type.packed_bytes(l.w.cols) + 64;
    l.scratch = static_cast<char*>(turn.reserve(scratch_bytes + most * l.packed_bytes));
    if (!l.scratch) return shoal::NO_MEMORY;
    l.packed = l.scratch + scratch_bytes;
    const shoal::Job job = tokens == 1 ? dot_job : tile_job;
    const int64_t most_rows =
        tokens == 1 ? ceil_div(DOT_JOB_BYTES, JOB_ROWS * l.w.row_bytes) * JOB_ROWS : TILE_ROWS;
    l.job_rows = least(share, most_rows);
    for (int64_t tile = 0; tile < tiles; tile++) {
        l.token0 = tokens * tile / tiles;
        l.tokens = tokens * (tile + 1) / tiles - l.token0;
        turn.run(l.tokens, l.tokens * l.w.cols, pack_job, &l);
        turn.run(ceil_div(l.w.rows, l.job_rows), l.w.rows * l.w.cols * l.tokens, job, &l);
    }
    return shoal::OK;
}

}  // namespace
