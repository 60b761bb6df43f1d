// Quantised weights times inputs of 16 or 8 bits (`inputs.h`): sums of products are whole numbers, exact.
//
// A run of columns adds one float to each output, (sum of q * input) * (weight scale * input scale), and a second one
// if the type has lows; runs come in ascending order. Few tokens use the stored bytes, many use unpacked tiles. Both
// end in `add`, so batching, threads and tiling change no bit.
#pragma once
#include "blocks.h"
#include "inputs.h"
#include "product.h"

namespace {

// Which part of a group of inputs the columns of a run are: 0 or 1 for a half, 2 for all.
template <class W>
INLINE int part_of(int run) {
    return W::QUADS == 8 ? 2 : run % 2;
}

template <class W, class Scheme>
INLINE const Input<Scheme>& input_of(const Input<Scheme>* x, int run) {
    return x[run * W::QUADS * 4 / GROUP];
}

template <class W, class Scheme>
INLINE Known known_of(const Input<Scheme>* x, int run) {
    return input_of<W>(x, run).known(part_of<W>(run));
}

template <class W, class Scheme>
INLINE vf add(vf acc, vi sum, vf scale, vf low, const Input<Scheme>* x, int run) {
    const Input<Scheme>& in = input_of<W>(x, run);
    acc = fma(to_float(sum), scale * splat(in.scale), acc);
    if (!W::HAS_LOW) return acc;
    return fma(low, splat(W::QUADS == 8 ? in.low : in.scale * (float)in.sums[run % 2]), acc);
}

// Writes LANES rows, or as many as there are.
INLINE void store_rows(float* y, vf v, int64_t rows) {
    if (rows >= LANES) return store(y, v);
    if (rows > 0) memcpy(y, &v, (size_t)rows * sizeof(float));
}

constexpr int AHEAD = PARTS == 1 ? 4096 : 8192;  // weights are fetched this many bytes ahead

// A band and T tokens.
template <class W, class Scheme, int T>
INLINE void multiply_band(const uint8_t* band, int64_t blocks, const Input<Scheme>* const* x, float* const* y, int64_t rows) {
    constexpr int CHAINS = T == 1 ? Scheme::CHAINS : 1;  // sums of a run that grow side by side
    vf acc[PARTS][T] = {};
    for (int64_t b = 0; b < blocks; b++, band += BAND * W::bytes) {
        for (int part = 0; part < PARTS; part++) {
            const Input<Scheme>* in[T];
            for (int t = 0; t < T; t++) in[t] = unknown(x[t] + b * (W::weights / GROUP));
            const Lines lines(band, part, band + AHEAD + part * (BAND * W::bytes / PARTS));
            typename Scheme::Sum sum[W::RUNS][T][CHAINS];
#pragma GCC unroll 16
            for (int run = 0; run < W::RUNS; run++) {
                for (int t = 0; t < T; t++) {
                    sum[run][t][0] = Scheme::template start<W>(known_of<W>(in[t], run));
                    for (int c = 1; c < CHAINS; c++) sum[run][t][c] = typename Scheme::Sum{};
                }
            }
            W::unpack(lines, [&](int i, vb q) INLINE_LAMBDA {
                typename Scheme::Half w[Scheme::HALVES];
                Scheme::template halve<W>(q, w);
                for (int half = 0; half < Scheme::HALVES; half++) {
                    for (int t = 0; t < T; t++) {
                        typename Scheme::Sum& to = sum[i / W::QUADS][t][(i + half) % CHAINS];
                        to = Scheme::mac(to, w[half], in[t][i / 8].q[i % 8], half);
                    }
                }
            });
            W::scales(lines, [&](int run, vf scale, vf low) INLINE_LAMBDA {
                for (int t = 0; t < T; t++) {
                    const Known known = known_of<W>(in[t], run);
                    vi whole = Scheme::template total<W>(sum[run][t][0], known);
                    for (int c = 1; c < CHAINS; c++) whole += Scheme::template total<W>(sum[run][t][c], {});
                    acc[part][t] = add<W>(acc[part][t], whole, scale, low, in[t], run);
                }
            });
        }
    }
    for (int part = 0; part < PARTS; part++) {
        for (int t = 0; t < T; t++) store_rows(y[t] + part * LANES, acc[part][t], rows - part * LANES);
    }
}

// DIRECT_TOKENS share one unpacking in registers; up to FEW_TOKENS that is faster than tiles.
template <class W>
constexpr bool LIGHT = W::RUNS == 1 && LANES == 16;
template <class W>
constexpr int DIRECT_TOKENS = LIGHT<W> ? 8 : LANES == 16 ? 4 : 2;
template <class W>
constexpr int64_t FEW_TOKENS = LIGHT<W> ? 16 : 4;

template <class W>
INLINE const uint8_t* band_of(const shoal::Weights& w, int64_t row) {
    return static_cast<const uint8_t*>(w.data) + row * (w.cols / W::weights * W::bytes);
}

template <class W, class Bits>
void few_tokens(const shoal::Weights& w, int64_t row0, int64_t rows, const Tokens& x, const Output& y) {
    using Scheme = typename Bits::template Few<W>;
    const int64_t blocks = w.cols / W::weights;
    for (int64_t r = 0; r < rows; r += BAND) {
        const uint8_t* band = band_of<W>(w, row0 + r);
        for (int64_t t = 0; t < x.count; t += DIRECT_TOKENS<W>) {
            const Input<Scheme>* in[DIRECT_TOKENS<W>];
            float* out[DIRECT_TOKENS<W>];
            for (int i = 0; i < DIRECT_TOKENS<W>; i++) {  // after the last token that one again, with the same result
                const int64_t token = least<int64_t>(t + i, x.count - 1);
                in[i] = reinterpret_cast<const Input<Scheme>*>(x.packed[token]);
                out[i] = y.row(token) + r;
            }
            const int64_t tokens = x.count - t;
            if (tokens == 1) multiply_band<W, Scheme, 1>(band, blocks, in, out, rows - r);
            else if (tokens == 2) multiply_band<W, Scheme, 2>(band, blocks, in, out, rows - r);
            else if (tokens <= 4) multiply_band<W, Scheme, (DIRECT_TOKENS<W> < 4 ? DIRECT_TOKENS<W> : 4)>(band, blocks, in, out, rows - r);
            else multiply_band<W, Scheme, DIRECT_TOKENS<W>>(band, blocks, in, out, rows - r);
        }
    }
}

// CHUNK: columns unpacked at once, for the first-level cache.
#if defined(__AVX512F__)
constexpr int VECTORS = 2, TILE_BATCH = 6;  // 12 whole and 12 float sums, 2 weights and 1 input of 32 registers
constexpr int64_t CHUNK = 256;
#elif defined(__AVX2__)
#if defined(__AVXVNNI__)
constexpr int VECTORS = 2, TILE_BATCH = 6;  // a product takes five cycles, and two begin in each
#else
constexpr int VECTORS = 2, TILE_BATCH = 4;
#endif
constexpr int64_t CHUNK = 512;
#else
constexpr int VECTORS = 4, TILE_BATCH = 2;
constexpr int64_t CHUNK = 256;
#endif
constexpr int64_t TILE_STEP = VECTORS * LANES;  // rows unpacked together

// VECTORS * LANES rows of a block, unpacked.
template <class W, class Scheme>
struct Tile {
    typename Scheme::Half halves[W::weights / 4][Scheme::HALVES][VECTORS];
    vf scale[W::RUNS][VECTORS];
    vf low[W::HAS_LOW ? W::RUNS : 1][VECTORS];
};

template <class W, class Scheme>
INLINE void unpack_tile(const Lines& lines, int v, Tile<W, Scheme>& tile) {
    W::unpack(lines, [&](int i, vb q) INLINE_LAMBDA {
        typename Scheme::Half w[Scheme::HALVES];
        Scheme::template halve<W>(q, w);
        for (int half = 0; half < Scheme::HALVES; half++) tile.halves[i][half][v] = w[half];
    });
    W::scales(lines, [&](int run, vf scale, vf low) INLINE_LAMBDA {
        tile.scale[run][v] = scale;
        if (W::HAS_LOW) tile.low[run][v] = low;
    });
}

// Adds to the sums of a tile's rows and T tokens, which are zero at first.
template <class W, class Scheme, int T>
void multiply_tile(const Tile<W, Scheme>* w, int64_t blocks, const Input<Scheme>* const* x, bool first, vf (*sums)[VECTORS]) {
    vf acc[T][VECTORS];
    const Input<Scheme>* in[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        for (int v = 0; v < VECTORS; v++) acc[t][v] = first ? vf{} : sums[t][v];
        in[t] = x[t];
    }
    for (int64_t b = 0; b < blocks; b++, w++) {
        for (int run = 0; run < W::RUNS; run++) {
            typename Scheme::Sum sum[T][VECTORS];
            const char* q[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                q[t] = input_of<W>(in[t], run).q[run * W::QUADS % 8];
                const Known known = known_of<W>(in[t], run);
                for (int v = 0; v < VECTORS; v++) sum[t][v] = Scheme::template start<W>(known);
            }
#pragma GCC unroll 8
            for (int i = 0; i < W::QUADS; i++) {
#pragma GCC unroll 2
                for (int half = 0; half < Scheme::HALVES; half++) {
                    typename Scheme::Half rows[VECTORS];
                    for (int v = 0; v < VECTORS; v++) rows[v] = held(w->halves[run * W::QUADS + i][half][v]);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) {
                        for (int v = 0; v < VECTORS; v++) {
                            sum[t][v] = Scheme::mac(sum[t][v], rows[v], q[t] + Scheme::QUAD * i, half);
                        }
                    }
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const Known known = known_of<W>(in[t], run);
                for (int v = 0; v < VECTORS; v++) {
                    const vi whole = Scheme::template total<W>(sum[t][v], known);
                    acc[t][v] = add<W>(acc[t][v], whole, w->scale[run][v], w->low[W::HAS_LOW ? run : 0][v], in[t], run);
                }
            }
        }
        for (int t = 0; t < T; t++) in[t] += W::weights / GROUP;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        for (int v = 0; v < VECTORS; v++) sums[t][v] = acc[t][v];
    }
}

template <class W, class Scheme>
using MultiplyTile = void (*)(const Tile<W, Scheme>*, int64_t, const Input<Scheme>* const*, bool, vf (*)[VECTORS]);

template <class W, class Scheme>
MultiplyTile<W, Scheme> multiply_tile_of(int64_t tokens) {
    static constexpr MultiplyTile<W, Scheme> all[] = {
        multiply_tile<W, Scheme, 1>, multiply_tile<W, Scheme, 2>, multiply_tile<W, Scheme, least(3, TILE_BATCH)>,
        multiply_tile<W, Scheme, least(4, TILE_BATCH)>, multiply_tile<W, Scheme, least(5, TILE_BATCH)>,
        multiply_tile<W, Scheme, TILE_BATCH>};
    return all[tokens - 1];
}

template <class W, class Scheme>
struct alignas(64) TileScratch {
    Tile<W, Scheme> tiles[CHUNK / W::weights];
    vf sums[TILE_ROWS / TILE_STEP][TILE_TOKENS][VECTORS];
};

// What a job of many tokens unpacks: TILE_STEP rows from `row` on, of which no row from `rows` on exists, in columns
// [k, k + blocks * W::weights).
struct Patch {
    int64_t row, rows, k, blocks;
};

// After the last band that one again, for sums nobody reads.
template <class W, class Scheme>
void unpack_bands(const shoal::Weights& w, const Patch& p, Tile<W, Scheme>* tiles) {
    for (int v = 0; v < VECTORS; v++) {
        const int64_t row = least(p.row + v / PARTS * BAND, (p.rows - 1) / BAND * BAND);
        const uint8_t* block = band_of<W>(w, row) + p.k / W::weights * BAND * W::bytes;
        const int64_t chunk = p.blocks * BAND * W::bytes, ahead = chunk + v % PARTS * (BAND * W::bytes / PARTS);
        for (int64_t b = 0; b < p.blocks; b++, block += BAND * W::bytes) {
            unpack_tile<W, Scheme>(Lines(block, v % PARTS, block + ahead), v, tiles[b]);
        }
    }
}

template <class W, class Scheme>
using Unpack = void (*)(const shoal::Weights&, const Patch&, Tile<W, Scheme>*);

template <class W, class Scheme, Unpack<W, Scheme> UNPACK>
void many_tokens(const shoal::Weights& w, int64_t row0, int64_t rows, const Tokens& x, const Output& y, char* memory) {
    auto& scratch = *reinterpret_cast<TileScratch<W, Scheme>*>(memory);
    const int64_t batches = ceil_div(x.count, TILE_BATCH);
    for (int64_t k = 0; k < w.cols; k += CHUNK) {
        const int64_t blocks = ceil_div(least(CHUNK, w.cols - k), W::weights);
        for (int64_t r = 0; r < rows; r += TILE_STEP) {
            UNPACK(w, {row0 + r, row0 + rows, k, blocks}, scratch.tiles);
            for (int64_t i = 0; i < batches; i++) {
                const int64_t from = x.count * i / batches, until = x.count * (i + 1) / batches;
                const Input<Scheme>* in[TILE_BATCH];
                for (int64_t t = from; t < until; t++) {
                    in[t - from] = reinterpret_cast<const Input<Scheme>*>(x.packed[t]) + k / GROUP;
                }
                multiply_tile_of<W, Scheme>(until - from)(scratch.tiles, blocks, in, k == 0, scratch.sums[r / TILE_STEP] + from);
            }
        }
    }
    for (int64_t t = 0; t < x.count; t++) {
        for (int64_t r = 0; r < rows; r += LANES) {
            store_rows(y.row(t) + r, scratch.sums[r / TILE_STEP][t][r / LANES % VECTORS], rows - r);
        }
    }
}

// The same bits as `reference.py`, because only one step rounds.
template <class W>
void decode_quantised(const shoal::Weights& w, int64_t row, float* out) {
    const uint8_t* block = band_of<W>(w, row / BAND * BAND);
    const int part = (int)(row % BAND) / LANES, lane = (int)(row % LANES);
    for (int64_t k = 0; k < w.cols; k += W::weights, block += BAND * W::bytes) {
        const Lines lines(block, part, nullptr);
        int32_t quads[W::weights / 4];
        W::unpack(lines, [&](int i, vb q) INLINE_LAMBDA { quads[i] = ((vi)q)[lane]; });
        W::scales(lines, [&](int run, vf scale, vf low) INLINE_LAMBDA {
            for (int i = 0; i < 4 * W::QUADS; i++) {
                const int column = run * 4 * W::QUADS + i;
                const int q = (quads[column / 4] >> column % 4 * 8 & 255) - W::OFFSET;
                out[k + column] = W::HAS_LOW ? (float)q * scale[lane] + low[lane] : (float)q * scale[lane];
            }
        });
    }
}

template <class W, class Bits>
constexpr Multiply multiply_quantised() {
    using FewScheme = typename Bits::template Few<W>;
    using ManyScheme = typename Bits::template Many<W>;
    return {FEW_TOKENS<W>,
            {Bits::template form<ManyScheme>(), Bits::template form<FewScheme>()},
            few_tokens<W, Bits>,
            many_tokens<W, ManyScheme, unpack_bands<W, ManyScheme>>,
            sizeof(TileScratch<W, ManyScheme>)};
}

template <class W>
constexpr Type quantised_type() {
    return {true, W::weights, W::bytes, {multiply_quantised<W, Bits16>(), multiply_quantised<W, Bits8>()}, decode_quantised<W>};
}

}  // namespace
