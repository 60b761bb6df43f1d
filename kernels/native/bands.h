// Bands: sixteen rows of quantised weights, interleaved; the integer half of the vector layer.
//
// A block of a band holds the same block of sixteen rows, cut into pieces of four bytes (of two: its half-precision
// fields) with the same piece of all rows side by side: what lies `offset` bytes into a row's block begins 16 * offset
// bytes into the band's. So a lane of a vector is a row, four columns deep, and nothing moves between lanes. Knows how
// such vectors are loaded and multiplied with inputs, exactly; knows nothing of weight types.
#pragma once
#include "simd.h"

namespace {

constexpr int BAND = 16;             // rows
constexpr int PARTS = BAND / LANES;  // vectors to a line of a band

// Loops over the lines of a block: unrolled, sums stay in registers; narrow machines have too few of them.
#if defined(__AVX2__)
#define UNROLL_BLOCK _Pragma("GCC unroll 32")
#else
#define UNROLL_BLOCK _Pragma("GCC unroll 1")
#endif

typedef uint8_t vb __attribute__((vector_size(LANES * 4)));
typedef int16_t vw __attribute__((vector_size(LANES * 4)));
typedef uint16_t vuw __attribute__((vector_size(LANES * 4)));

// One of the PARTS of a band's block: LANES rows of it.
struct Lines {
    const uint8_t *fours, *twos;

    INLINE Lines(const uint8_t* block, int part) : fours(block + part * 4 * LANES), twos(block + part * 2 * LANES) {}
    INLINE vb line(int offset) const { return read<vb>(fours + BAND * offset); }
    INLINE vf halves(int offset) const { return load_half(twos + BAND * offset); }
};

// Each byte moved right by some bits (left if negative) and masked; the mask drops what neighbours leak.
INLINE vb bits(vb v, int right, uint8_t mask) {
    return (vb)(right < 0 ? (vuw)v << -right : (vuw)v >> right) & mask;
}

// Byte `i` of each lane, unsigned or signed.
INLINE vi byte_of(vb v, int i) { return (vi)v >> 8 * i & 255; }
INLINE vi signed_byte_of(vb v, int i) { return (vi)v << (24 - 8 * i) >> 24; }

// 16 bytes for every four lanes.
INLINE vb repeat16(const void* p) {
#if defined(__AVX512F__)
    return (vb)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (vb)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#else
    return read<vb>(p);
#endif
}

// Bytes of v by index, within each 16.
#if defined(__AVX512F__)
INLINE vb shuffle(vb v, vb index) { return (vb)_mm512_shuffle_epi8((__m512i)v, (__m512i)index); }
#elif defined(__AVX2__)
INLINE vb shuffle(vb v, vb index) { return (vb)_mm256_shuffle_epi8((__m256i)v, (__m256i)index); }
#elif defined(__ARM_NEON)
INLINE vb shuffle(vb v, vb index) { return (vb)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)index); }
#else
__attribute__((noinline)) vb shuffle(vb v, vb index) {
    uint8_t bytes[16], from[16], moved[16];
    memcpy(bytes, &v, 16);
    memcpy(from, &index, 16);
    for (int i = 0; i < 16; i++) moved[i] = bytes[from[i] & 15];
    return read<vb>(moved);
}
#endif

// Weights are unpacked to bytes q from 0 to 255, four columns to a lane, and mean q - OFFSET; inputs are whole numbers
// of 16 bits. What follows multiplies the two and adds up exactly: as words, two products at a time, or, where a
// machine has only dot products of bytes, with each input as 256 * high + low.
// Four columns of LANES rows make HALVES operands, which are multiplied one by one.
#if defined(__ARM_FEATURE_DOTPROD)

constexpr int HALVES = 1;
typedef vb Half;
struct Sum {
    vi high, low;
};

template <int OFFSET>
INLINE void halve(vb q, Half* out) {
    out[0] = q - (uint8_t)OFFSET;
}
// Where the sum of products with inputs begins, whose own sum is known.
template <int OFFSET>
INLINE Sum start(int32_t) {
    return {vi{}, vi{}};
}
// Adds products with four inputs, those of half `half`.
INLINE Sum mac(Sum sum, Half w, const char* x, int) {
    const int8x8_t inputs = vld1_s8((const int8_t*)x);
    return {(vi)vdotq_lane_s32((int32x4_t)sum.high, (int8x16_t)w, inputs, 0),
            (vi)vdotq_lane_s32((int32x4_t)sum.low, (int8x16_t)w, inputs, 1)};
}
INLINE vi total(const Sum& sum) { return (sum.high << 8) + sum.low; }

// Inputs as `mac` reads them, eight bytes for every four.
INLINE void arrange(vi x, char* out) {
    for (int i = 0; i < 4; i++) {
        out[i] = (char)((x[i] + 128) >> 8);
        out[4 + i] = (char)x[i];
    }
}

#else

constexpr int HALVES = 2;  // even and odd columns
typedef vw Half;
typedef vi Sum;

// Adds, for every lane, the products of two words.
INLINE vi dot_words(vi sum, vw a, vw b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    const int32x4_t first = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    return sum + (vi)vpaddq_s32(first, vmull_high_s16(x, y));
#else
    return sum + ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

template <int OFFSET>
INLINE void halve(vb q, Half* out) {
    out[0] = (vw)((vuw)q & 255);
    out[1] = (vw)((vuw)q >> 8);
}
template <int OFFSET>
INLINE Sum start(int32_t sum) {
    return vi{} - OFFSET * sum;
}
INLINE Sum mac(Sum sum, Half w, const char* x, int half) {
    return dot_words(sum, w, (vw)(vi{} + read<int32_t>(x + 4 * half)));
}
INLINE vi total(Sum sum) { return sum; }

INLINE void arrange(vi x, char* out) {
    typedef int16_t words __attribute__((vector_size(LANES * 2)));
    typedef uint64_t quads __attribute__((vector_size(LANES * 2)));
    const quads q = (quads)__builtin_convertvector(x, words);  // of 0, 1, 2, 3 become 0, 2, 1, 3
    const quads even_odd = (q & 0xffff00000000ffff) | (q & 0xffff0000) << 16 | (q >> 16 & 0xffff0000);
    memcpy(out, &even_odd, sizeof even_odd);
}

#endif

}  // namespace
