// bf16 weights times inputs of 14 bits: as words, where a machine multiplies those at twice the speed of floats.
//
// The weights of a row in a stretch of 128 columns become multiples of 2^-12 of a power of two, the greatest that their
// largest magnitude reaches. Those from a 32nd of it on keep every bit, the others are rounded, halves to even
// (`reference.as_words`). Sums of products are whole numbers, exact, and end in the `add` of quantised weights, so here,
// too, batching, threads and tiling change no bit. A stretch with an infinite or NaN weight makes NaN.
#pragma once
#include "ahead.h"
#include "linear_float.h"
#include "linear_quantised.h"

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)

// As `many_tokens` knows a type: a block is a group of inputs' columns, unpacked as words.
struct BF16Words {
    static constexpr int weights = GROUP, RUNS = 1, QUADS = GROUP / 4, OFFSET = 0;
    static constexpr bool HAS_LOW = false;
};

constexpr int64_t STRETCH = 4 * GROUP;  // with a shorter one, finding powers takes longer than memory does
constexpr int WORD_BITS = 12;           // words of up to 255 / 128 * 2^12 = 8160 (`Bits14`)
static_assert(STRETCH <= CHUNK && CHUNK % STRETCH == 0, "tiles begin with a stretch");

struct FourRows;

INLINE __m128i greater_words(__m128i a, __m128i b) {
    return _mm_max_epi16(_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
}

// What a stretch of each of four rows is multiplied by to become words, and what a word is worth.
struct Scales {
    __m128i inverse;
    __m128 scale;

    Scales() = default;
    Scales(const FourRows& rows, int64_t k);
    template <int ROW>
    INLINE __m256 inverse_of() const {
        return _mm256_castsi256_ps(_mm256_broadcastd_epi32(_mm_shuffle_epi32(inverse, ROW * 0x55)));
    }
};

// A group of four rows as words.
struct FourWords {
    __m256i of[4][2];

    FourWords(const FourRows& rows, int64_t k, const Scales& by);
};

// Four rows of weights, of which the last comes again where there are fewer.
struct FourRows {
    const uint8_t* at[4];

    INLINE FourRows(const shoal::Weights& w, int64_t row, int64_t end) {
        for (int r = 0; r < 4; r++) at[r] = float_row<BF16>(w, least(row + r, end - 1));
    }
    INLINE __m256i load(int row, int64_t k) const { return read<__m256i>(at[row] + 2 * k); }

    // Calls `use(k, words, scale)` for the groups of columns [from, until). The last is filled up with zeros.
    template <class Use>
    INLINE void groups(int64_t from, int64_t until, Use use) const {
        const int64_t whole = from + (until - from) / STRETCH * STRETCH;
        Scales next;
        if (from < whole) next = Scales(*this, from);
        for (int64_t k = from; k < whole;) {
            const Scales by = next;
            if (k + STRETCH < whole) next = Scales(*this, k + STRETCH);  // early, or all that follows would wait for it
            for (const int64_t end = k + STRETCH; k < end; k += GROUP) use(k, FourWords(*this, k, by), by.scale);
        }
        if (whole == until) return;
        uint8_t last[4][2 * STRETCH] = {};
        FourRows filled = *this;
        for (int r = 0; r < 4; r++) {
            memcpy(last[r], at[r] + 2 * whole, (size_t)(2 * (until - whole)));
            filled.at[r] = last[r];
        }
        const Scales by(filled, 0);
        for (int64_t k = whole; k < until; k += GROUP) use(k, FourWords(filled, k - whole, by), by.scale);
    }
};

INLINE Scales::Scales(const FourRows& rows, int64_t k) {
    __m128i most[4];  // of each row, in some of eight words: magnitudes sort as numbers do
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    for (int r = 0; r < 4; r++) {
        __m256i all = _mm256_and_si256(rows.load(r, k), magnitude);
#pragma GCC unroll 8
        for (int64_t i = k + 16; i < k + STRETCH; i += 16) {
            all = _mm256_max_epi16(all, _mm256_and_si256(rows.load(r, i), magnitude));
        }
        most[r] = _mm_max_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    }
    const __m128i two[2] = {greater_words(most[0], most[1]), greater_words(most[2], most[3])};
    const __m128i four = _mm_max_epi16(_mm_unpacklo_epi32(two[0], two[1]), _mm_unpackhi_epi32(two[0], two[1]));
    const __m128i largest = _mm_cvtepu16_epi32(_mm_max_epi16(four, _mm_srli_si128(four, 8)));
    // Exponents as floats have them: from 255 on there are no numbers, and from WORD_BITS down no scale.
    const __m128i power = _mm_max_epi32(_mm_srli_epi32(largest, 7), _mm_set1_epi32(WORD_BITS + 1));
    const __m128i none = _mm_cmpeq_epi32(power, _mm_set1_epi32(255));
    scale = _mm_castsi128_ps(_mm_or_si128(_mm_slli_epi32(_mm_sub_epi32(power, _mm_set1_epi32(WORD_BITS)), 23), none));
    inverse = _mm_slli_epi32(_mm_sub_epi32(_mm_set1_epi32(2 * 127 + WORD_BITS), power), 23);
}

// 16 weights as words. Adding 1.5 * 2^23 rounds a float and leaves its number in the low half.
INLINE __m256i to_words(__m256i weights, __m256 inverse) {
    const __m256 magic = _mm256_set1_ps(0x1.8p23f);
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(weights, _mm256_set1_epi32((int)0xffff0000)));
    const __m256i low = _mm256_castps_si256(_mm256_fmadd_ps(even, inverse, magic));
    const __m256i high = _mm256_castps_si256(_mm256_fmadd_ps(odd, inverse, magic));
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}

INLINE FourWords::FourWords(const FourRows& rows, int64_t k, const Scales& by) {
    for (int i = 0; i < 2; i++) {
        of[0][i] = to_words(rows.load(0, k + 16 * i), by.inverse_of<0>());
        of[1][i] = to_words(rows.load(1, k + 16 * i), by.inverse_of<1>());
        of[2][i] = to_words(rows.load(2, k + 16 * i), by.inverse_of<2>());
        of[3][i] = to_words(rows.load(3, k + 16 * i), by.inverse_of<3>());
    }
}

// Of each four words 0, 1, 2, 3 become 0, 2, 1, 3, which is how inputs lie, and the other way round.
INLINE __m256i reordered(__m256i words) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
}

INLINE __m128i sum4(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

template <int T>
void multiply_rows(const FourRows& rows, int64_t cols, const Input<SignedWords>* const* x, __m128* sums) {
    __m128 acc[T];
    for (int t = 0; t < T; t++) acc[t] = _mm_setzero_ps();
    const uint8_t* ahead = rows.at[0] + AHEAD_BYTES;  // rows lie one behind the other, and are asked for in that order
    rows.groups(0, cols, [&](int64_t k, const FourWords& w, __m128 scale) INLINE_LAMBDA {
        for (int r = 0; r < 4; r++, ahead += 2 * GROUP) __builtin_prefetch(ahead);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const Input<SignedWords>& in = x[t][k / GROUP];
            const __m256i first = reordered(read<__m256i>(in.q[0])), second = reordered(read<__m256i>(in.q[4]));
            __m256i sum[4];
            for (int r = 0; r < 4; r++) {
                sum[r] = _mm256_add_epi32(_mm256_madd_epi16(w.of[r][0], first), _mm256_madd_epi16(w.of[r][1], second));
            }
            const __m128 whole = _mm_cvtepi32_ps(sum4(sum[0], sum[1], sum[2], sum[3]));
            acc[t] = _mm_fmadd_ps(whole, _mm_mul_ps(scale, _mm_set1_ps(in.scale)), acc[t]);
        }
    });
    for (int t = 0; t < T; t++) sums[t] = acc[t];
}

constexpr int64_t FEW_BF16_TOKENS = 4;

void few_tokens_bf16(const shoal::Weights& w, int64_t row0, int64_t rows, const Tokens& x, const Output& y) {
    static constexpr decltype(&multiply_rows<1>) all[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                          multiply_rows<FEW_BF16_TOKENS>};
    const Input<SignedWords>* in[FEW_BF16_TOKENS];
    for (int64_t t = 0; t < x.count; t++) in[t] = reinterpret_cast<const Input<SignedWords>*>(x.packed[t]);
    for (int64_t r = 0; r < rows; r += 4) {
        __m128 sums[FEW_BF16_TOKENS];
        all[x.count - 1](FourRows(w, row0 + r, row0 + rows), w.cols, in, sums);
        for (int64_t t = 0; t < x.count; t++) {
            memcpy(y.row(t) + r, &sums[t], (size_t)least<int64_t>(4, rows - r) * sizeof(float));
        }
    }
}

// Puts each half of v into its vector's `part`, the first or the second half.
INLINE void put(__m256i v, vw* low, vw* high, int part) {
    _mm_store_si128(reinterpret_cast<__m128i*>(low) + part, _mm256_castsi256_si128(v));
    _mm_store_si128(reinterpret_cast<__m128i*>(high) + part, _mm256_extracti128_si256(v, 1));
}

using BF16Tile = Tile<BF16Words, SignedWords>;

// Four rows of a group, the `part` of a tile's vector v: columns of rows become rows of columns.
INLINE void unpack_four(const FourWords& words, __m128 scale, int v, int part, BF16Tile& tile) {
    for (int i = 0; i < 2; i++) {
        __m256i r[4];
        for (int row = 0; row < 4; row++) r[row] = reordered(words.of[row][i]);
        const __m256i low[2] = {_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpacklo_epi32(r[2], r[3])};
        const __m256i high[2] = {_mm256_unpackhi_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[2], r[3])};
        // Pairs of eight columns, and in the upper half those of the next eight.
        const __m256i pairs[4] = {_mm256_unpacklo_epi64(low[0], low[1]), _mm256_unpackhi_epi64(low[0], low[1]),
                                  _mm256_unpacklo_epi64(high[0], high[1]), _mm256_unpackhi_epi64(high[0], high[1])};
        for (int pair = 0; pair < 4; pair++) {
            const int quad = 4 * i + pair / 2;
            put(pairs[pair], &tile.halves[quad][pair % 2][v], &tile.halves[quad + 2][pair % 2][v], part);
        }
    }
    _mm_store_ps(reinterpret_cast<float*>(&tile.scale[0][v]) + 4 * part, scale);
}

void unpack_rows(const shoal::Weights& w, const Patch& p, BF16Tile* tiles) {
    const int64_t until = least(p.k + p.blocks * GROUP, w.cols), below = TILE_STEP * 2 * w.cols;
    for (int64_t row = 0; row < TILE_STEP; row += 4) {
        const FourRows rows(w, p.row + row, p.rows);
        rows.groups(p.k, until, [&](int64_t k, const FourWords& words, __m128 scale) INLINE_LAMBDA {
            for (int r = 0; r < 4; r++) fetch_line(rows.at[r] + 2 * k + below);  // what is unpacked next
            unpack_four(words, scale, (int)(row / LANES), (int)(row % LANES / 4), tiles[(k - p.k) / GROUP]);
        });
    }
}

constexpr Type bf16_type() {
    constexpr Multiply by{FEW_BF16_TOKENS,
                          {SHORT_WORDS, SHORT_WORDS},
                          few_tokens_bf16,
                          many_tokens<BF16Words, SignedWords, unpack_rows>,
                          sizeof(TileScratch<BF16Words, SignedWords>)};
    return {false, 1, 2, {by, by}, decode_float<BF16>};
}

#else

constexpr Type bf16_type() { return float_type<BF16>(); }

#endif

}  // namespace
