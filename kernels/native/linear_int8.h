// Quantised weights times inputs quantised to bytes (`inputs.h`): sums of products are whole numbers, exact.
//
// A block adds one float to each of a row's four lanes, (sum of q * input) * (weight scale * input scale), and
// perhaps a second for the low; blocks come in ascending order, `fold` adds the lanes. One token straight from
// the file's bytes and several over unpacked tiles both end in `add`, so batching, threads and tiling change no
// bit.
#pragma once
#include "blocks.h"
#include "inputs.h"
#include "jobs.h"

namespace {

// GROUP rows of a block, unpacked.
struct Tile32 {
    vb q[2];
    vf scale, low;
};

struct Tile256 {
    vb q[16];
    vw scale[16];
    vw low[2];
    vf d, dmin;
};

template <class W>
INLINE vi start(const Input32& x) {
    return W::HAS_LOW ? vi{} : (vi)repeat16(x.term);
}

template <class W>
INLINE vf add(vf acc, vi sum, const Tile32& w, const Input32& x) {
    acc = fma(to_float(sum), w.scale * splat(x.scale), acc);
    return W::HAS_LOW ? fma(w.low, (vf)repeat16(x.term), acc) : acc;
}

template <class W>
INLINE vi start(const Input256&) {
    return vi{};
}

template <class W>
INLINE vf add(vf acc, vi sum, const Tile256& w, const Input256& x) {
    const vi low = dot_words(dot_words(vi{}, w.low[0], (vw)repeat16(x.sums)), w.low[1], (vw)repeat16(x.sums + 8));
    if (!W::HAS_LOW) return fma(to_float(sum - low), w.d * splat(x.scale), acc);
    acc = fma(to_float(sum), w.d * splat(x.scale), acc);
    return fma(to_float(low), w.dmin * splat(-x.scale), acc);
}

// What small and large types do differently.
template <class W, int WEIGHTS = W::weights>
struct Block;

template <class W>
struct Block<W, 32> {
    using Input = Input32;
    using Tile = Tile32;

    static INLINE void unpack(const Rows& rows, Tile& tile) {
        W::unpack(rows, tile.q);
        load_halves(rows, 0, tile.scale, tile.low);
    }
    static INLINE vf multiply(const Rows& rows, const Input& x, vf acc) {
        Tile tile;
        unpack(rows, tile);
        vi sum = start<W>(x);
        for (int i = 0; i < 2; i++) sum = dot<W::SIGNED>(sum, tile.q[i], repeat16(x.q + 16 * i));
        return add<W>(acc, sum, tile, x);
    }
    static INLINE vi dot_part(const Tile& tile, int i, vb in, vi sum) { return dot<W::SIGNED>(sum, tile.q[i], in); }
};

template <class W>
struct Block<W, 256> {
    using Input = Input256;
    using Tile = Tile256;

    static INLINE void unpack(const Rows& rows, Tile& tile) {
        vw scale[2];
        W::scales(rows, scale, tile.low, tile.d, tile.dmin);
        W::unpack(rows, [&](int i, vb q) INLINE_LAMBDA {
            tile.q[i] = q;
            tile.scale[i] = spread(scale[i / 8], i % 8);
        });
    }
    static INLINE vf multiply(const Rows& rows, const Input& x, vf acc) {
        Tile tile;
        vw scale[2];
        vi sum = {};
        W::scales(rows, scale, tile.low, tile.d, tile.dmin);
        W::unpack(rows, [&](int i, vb q) INLINE_LAMBDA {
            sum = dot_scaled(sum, q, repeat16(x.q + 16 * i), spread(scale[i / 8], i % 8));
        });
        return add<W>(acc, sum, tile, x);
    }
    static INLINE vi dot_part(const Tile& tile, int i, vb in, vi sum) {
        return dot_scaled(sum, tile.q[i], in, tile.scale[i]);
    }
};

template <class W>
size_t input_bytes(int64_t cols) {
    return (size_t)(cols / W::weights) * sizeof(typename Block<W>::Input);
}

template <class W>
void pack_inputs(const float* x, int64_t cols, char* packed) {
    auto* in = reinterpret_cast<typename Block<W>::Input*>(packed);
    for (int64_t k = 0; k < cols; k += W::weights) pack_input<W>(x + k, *in++);
}

// The folded lanes of as many rows of a group as there are.
INLINE void fold_some(vf acc, int64_t rows, float* y) {
    if (rows >= GROUP) return fold(acc, y);
    float sums[GROUP];
    fold(acc, sums);
    for (int64_t i = 0; i < rows; i++) y[i] = sums[i];
}

template <class W>
void dot_int8_rows(const uint8_t* w, int64_t row_bytes, int64_t rows, const char* packed, int64_t cols, float* y) {
    const auto* inputs = reinterpret_cast<const typename Block<W>::Input*>(packed);
    const int64_t blocks = cols / W::weights;
    for (int64_t r = 0; r < rows; r += GROUP, w += GROUP * row_bytes) {
        Rows at(w, row_bytes, rows - r);
        const uint8_t* next = w + GROUP * row_bytes;
        vf acc = {};
        for (int64_t b = 0; b < blocks; b++) {
            for (int i = 0; i < GROUP * W::bytes; i += 64) __builtin_prefetch(next + i);
            acc = Block<W>::multiply(at, inputs[b], acc);
            at.read_bytes += W::bytes;
            next += GROUP * W::bytes;
        }
        fold_some(acc, rows - r, y + r);
    }
}

#if defined(__AVX512F__)
constexpr int GROUPS = 2, INT8_TOKENS = 6;  // 2 * 6 whole and 2 * 6 float sums of 32 registers
#elif defined(__AVX2__)
constexpr int GROUPS = 2, INT8_TOKENS = 3;
#else
constexpr int GROUPS = 2, INT8_TOKENS = 4;
#endif

// Adds to the lanes of GROUPS * GROUP unpacked rows and T tokens, which are zero at first.
template <class W, int T>
void multiply_tile(const void* unpacked, const char* packed, size_t stride, int64_t blocks, bool first, vf* sums) {
    using Tile = typename Block<W>::Tile;
    using Input = typename Block<W>::Input;
    vf acc[T][GROUPS] = {};
    if (!first) memcpy(acc, sums, sizeof acc);
    const Tile* w = static_cast<const Tile*>(unpacked);
    for (int64_t b = 0; b < blocks; b++, w += GROUPS, packed += sizeof(Input)) {
        const auto x = [&](int t) INLINE_LAMBDA -> const Input& {
            return *reinterpret_cast<const Input*>(packed + t * stride);
        };
        vi sum[T][GROUPS];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            for (int g = 0; g < GROUPS; g++) sum[t][g] = start<W>(x(t));
        }
        for (int i = 0; i < W::weights / 16; i++) {
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const vb in = repeat16(x(t).q + 16 * i);
                for (int g = 0; g < GROUPS; g++) sum[t][g] = Block<W>::dot_part(w[g], i, in, sum[t][g]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            for (int g = 0; g < GROUPS; g++) acc[t][g] = add<W>(acc[t][g], sum[t][g], w[g], x(t));
        }
    }
    memcpy(sums, acc, sizeof acc);
}

using MultiplyTile = void (*)(const void*, const char*, size_t, int64_t, bool, vf*);

template <class W>
MultiplyTile multiply_tile_of(int64_t tokens) {
    static constexpr MultiplyTile all[] = {multiply_tile<W, 1>, multiply_tile<W, 2>, multiply_tile<W, 3>,
                                           multiply_tile<W, 4>, multiply_tile<W, 5>, multiply_tile<W, 6>};
    return all[tokens - 1];
}

constexpr int64_t STEP = GROUPS * GROUP;  // rows unpacked together

template <class W>
struct alignas(64) Int8Scratch {
    typename Block<W>::Tile tiles[CHUNK / W::weights][GROUPS];
    vf sums[TILE_ROWS / STEP][TILE_TOKENS][GROUPS];
};

template <class W>
void tile_int8(const Linear& l, int64_t row0, int64_t rows, char* memory) {
    Int8Scratch<W>& scratch = *reinterpret_cast<Int8Scratch<W>*>(memory);
    const int64_t batches = ceil_div(l.tokens, INT8_TOKENS);
    for (int64_t k = 0; k < l.w.cols; k += CHUNK) {
        const int64_t blocks = least(CHUNK, l.w.cols - k) / W::weights;
        const char* x = l.packed + input_bytes<W>(k);
        for (int64_t r = 0; r < rows; r += STEP) {
            for (int g = 0; g < GROUPS; g++) {
                const int64_t row = least(r + g * GROUP, rows - 1);
                Rows at(l.row(row0 + row) + k / W::weights * W::bytes, l.w.row_bytes, rows - row);
                for (int64_t b = 0; b < blocks; b++, at.read_bytes += W::bytes) Block<W>::unpack(at, scratch.tiles[b][g]);
            }
            for (int64_t i = 0; i < batches; i++) {
                const int64_t from = l.tokens * i / batches, until = l.tokens * (i + 1) / batches;
                multiply_tile_of<W>(until - from)(scratch.tiles, x + from * l.packed_bytes, l.packed_bytes, blocks,
                                                  k == 0, scratch.sums[r / STEP][from]);
            }
        }
    }
    for (int64_t t = 0; t < l.tokens; t++) {
        for (int64_t r = 0; r < rows; r += GROUP) {
            fold_some(scratch.sums[r / STEP][t][r / GROUP % GROUPS], rows - r, l.output(t) + row0 + r);
        }
    }
}

// 16 weights of the first row of a vector, as in `reference.py` bit for bit: only one step rounds.
INLINE void decode16(vb q, int offset, float scale, float low, float* out) {
    uint8_t bytes[sizeof q];
    memcpy(bytes, &q, sizeof q);
    for (int i = 0; i < 16; i++) out[i] = (float)(int8_t)(bytes[i] - offset) * scale + low;
}

INLINE int first_word(vw v, int i) {
    int16_t words[sizeof v / 2];
    memcpy(words, &v, sizeof v);
    return words[i];
}

template <class W>
INLINE void decode_block(const Rows& rows, const Tile32&, float* out) {
    Tile32 tile;
    Block<W>::unpack(rows, tile);
    for (int i = 0; i < 2; i++) {
        decode16(tile.q[i], W::OFFSET, tile.scale[0], W::HAS_LOW ? tile.low[0] : 0.0f, out + 16 * i);
    }
}

template <class W>
INLINE void decode_block(const Rows& rows, const Tile256&, float* out) {
    vw scale[2], low[2];
    vf d, dmin;
    W::scales(rows, scale, low, d, dmin);
    W::unpack(rows, [&](int i, vb q) INLINE_LAMBDA {
        const float lowest = W::HAS_LOW ? -dmin[0] * (float)first_word(low[i / 8], i % 8) : 0.0f;
        decode16(q, W::OFFSET, d[0] * (float)first_word(scale[i / 8], i % 8), lowest, out + 16 * i);
    });
}

template <class W>
void decode_int8_row(const uint8_t* w, int64_t cols, float* out) {
    Rows at(w, 0, GROUP);
    for (int64_t k = 0; k < cols; k += W::weights, at.read_bytes += W::bytes) {
        decode_block<W>(at, typename Block<W>::Tile{}, out + k);
    }
}

template <class W>
constexpr Type int8_type() {
    return {input_bytes<W>, pack_inputs<W>, dot_int8_rows<W>, tile_int8<W>, sizeof(Int8Scratch<W>), decode_int8_row<W>};
}

}  // namespace
