// What a weight type contributes to a matrix product, and what all products share.
//
// Knows rows, tokens and outputs; the two ways to multiply are in `linear_float.h` and `linear_quantised.h`.
#pragma once
#include <string.h>

#include "home.h"
#include "simd.h"

namespace {

template <class T>
INLINE constexpr T least(T a, T b) {
    return a < b ? a : b;
}

template <class T>
INLINE T most(T a, T b) {
    return a > b ? a : b;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t TILE_TOKENS = 96;       // unpacking a row costs as much as multiplying it by some tokens
constexpr int64_t TILE_STEP_TOKENS = 12;  // tiles begin at multiples of it: whole batches of every machine
constexpr int64_t TILE_ROWS = 64;         // these share one load of inputs from the outer caches

// Tokens cut into tiles of nearly equal length, so they are short only if all are.
struct Tiling {
    int64_t tokens;

    int64_t steps() const { return ceil_div(tokens, TILE_STEP_TOKENS); }
    int64_t tiles() const { return ceil_div(tokens, TILE_TOKENS); }
    int64_t longest() const { return tokens ? least(tokens, ceil_div(steps(), tiles()) * TILE_STEP_TOKENS) : 0; }
    int64_t start(int64_t tile) const { return least(tokens, steps() * tile / tiles() * TILE_STEP_TOKENS); }
    int64_t length(int64_t tile) const { return start(tile + 1) - start(tile); }
};

// The inputs of each token, packed as the type of the weights needs them; they may lie anywhere.
struct Tokens {
    const char* const* packed;
    int64_t count;
};

// Where the results of a job go: its first row for token 0, and the stride from token to token.
struct Output {
    float* first;
    int64_t stride;
    float* row(int64_t token) const { return first + token * stride; }
};

// How the inputs of a token lie in memory (`operands.h`). There are words and planes of 16 bits.
enum Form { FLOATS, PLANES, WORDS, BYTES, BYTES_AS_WORDS, SHORT_WORDS, FORMS };

// How a type is multiplied by inputs of some bits. Rows start at whole bands; there are at most TILE_ROWS rows and
// TILE_TOKENS tokens to `many`.
struct Multiply {
    int64_t few_tokens;  // up to this number `few` is faster than `many`
    Form forms[2];       // of the inputs for `many`, for `few`
    void (*few)(const shoal::Weights& w, int64_t row0, int64_t rows, const Tokens& x, const Output& y);
    void (*many)(const shoal::Weights& w, int64_t row0, int64_t rows, const Tokens& x, const Output& y, char* scratch);
    size_t scratch_bytes;  // a thread's working memory for `many`, a multiple of 64

    Form form(int64_t tokens) const { return forms[tokens <= few_tokens]; }
};

struct Type {
    bool quantised;
    int block_weights, block_bytes;
    Multiply by[2];  // inputs of 16 bits, of 8; float weights have one way
    void (*decode)(const shoal::Weights& w, int64_t row, float* out);
};

}  // namespace
