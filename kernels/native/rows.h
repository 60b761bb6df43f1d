// Rows of bytes side by side: the integer half of the vector layer.
//
// A vector holds GROUP rows, 16 bytes of each: four 32-bit lanes a row, whatever the machine, so that sums
// over lanes have one order everywhere. Knows how such vectors are loaded, shuffled and multiplied; all
// products are exact. Knows nothing of weight types.
#pragma once
#include "simd.h"

namespace {

constexpr int GROUP = LANES / 4;

typedef uint8_t vb __attribute__((vector_size(LANES * 4)));
typedef int16_t vw __attribute__((vector_size(LANES * 4)));
typedef uint16_t vuw __attribute__((vector_size(LANES * 4)));

// GROUP rows and how far they have been read.
struct Rows {
    const uint8_t* first[GROUP];
    int64_t read_bytes = 0;

    // Rows `row_bytes` apart; beyond `count` the last row again, for results nobody reads.
    INLINE Rows(const uint8_t* rows, int64_t row_bytes, int64_t count) {
        for (int r = 0; r < GROUP; r++) first[r] = rows + (r < count ? r : count - 1) * row_bytes;
    }
    INLINE const uint8_t* at(int row, int64_t offset) const { return first[row] + read_bytes + offset; }
};

// Each byte moved right by some bits (left if negative) and masked; the mask drops what neighbours leak.
INLINE vb bits(vb v, int right, uint8_t mask) {
    return (vb)(right < 0 ? (vuw)v << -right : (vuw)v >> right) & mask;
}

// Weights below 64, or SIGNED ones, times signed inputs above -128, four products to a lane. A machine that
// multiplies only unsigned weights takes signed ones SIGNED_OFFSET too large; `from_signed` makes them so.
#if defined(__AVX512VNNI__)
constexpr int SIGNED_OFFSET = 128;
#else
constexpr int SIGNED_OFFSET = 0;
#endif

INLINE vb from_signed(vb v) { return v ^ (uint8_t)SIGNED_OFFSET; }

#if defined(__AVX512F__)

// 16 bytes for every row.
INLINE vb repeat16(const void* p) { return (vb)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }

// 16 bytes of each row, `offset` beyond what has been read.
INLINE vb load16(const Rows& rows, int64_t offset) {
    const auto row = [&](int r) INLINE_LAMBDA { return _mm_loadu_si128((const __m128i*)rows.at(r, offset)); };
    __m512i v = _mm512_castsi128_si512(row(0));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, row(1));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, row(2));
    return (vb)_mm512_mask_broadcast_i32x4(v, 0xf000, row(3));
}

// 4 bytes of each row in all four lanes of it.
INLINE vb load4(const Rows& rows, int64_t offset) {
    const auto row = [&](int r) INLINE_LAMBDA { return _mm_loadu_si32(rows.at(r, offset)); };
    __m512i v = _mm512_broadcastd_epi32(row(0));
    v = _mm512_mask_broadcastd_epi32(v, 0x00f0, row(1));
    v = _mm512_mask_broadcastd_epi32(v, 0x0f00, row(2));
    return (vb)_mm512_mask_broadcastd_epi32(v, 0xf000, row(3));
}

// Two neighbouring halves of each row, in all four lanes of it.
INLINE void load_halves(const Rows& rows, int64_t offset, vf& first, vf& second) {
    const auto row = [&](int r) INLINE_LAMBDA { return _mm_loadu_si32(rows.at(r, offset)); };
    __m256i v = _mm256_broadcastd_epi32(row(0));
    v = _mm256_mask_broadcastd_epi32(v, 0x0c, row(1));
    v = _mm256_mask_broadcastd_epi32(v, 0x30, row(2));
    v = _mm256_mask_broadcastd_epi32(v, 0xc0, row(3));
    const __m512 pairs = _mm512_cvtph_ps(v);
    first = (vf)_mm512_moveldup_ps(pairs);
    second = (vf)_mm512_movehdup_ps(pairs);
}

INLINE vb shuffle(vb v, vb index) { return (vb)_mm512_shuffle_epi8((__m512i)v, (__m512i)index); }

// The first (0) or last (1) eight bytes of each row as signed words.
INLINE vw widen(vb v, int half) {
    const __m512i b = (__m512i)v;
    return (vw)(half ? _mm512_unpackhi_epi8(b, b) : _mm512_unpacklo_epi8(b, b)) >> 8;
}

#if defined(__AVX512VNNI__)
template <bool SIGNED>
INLINE vi dot(vi sum, vb w, vb x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
INLINE vi dot_words(vi sum, vw a, vw b) {
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#else
INLINE vi dot_words(vi sum, vw a, vw b) { return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
template <bool SIGNED>
INLINE vi dot(vi sum, vb w, vb x) {
    if (SIGNED) {  // |w| times x with the sign of w
        x = (vb)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), __m512i{}, (__m512i)x);
        w = (vb)_mm512_abs_epi8((__m512i)w);
    }
    return dot_words(sum, (vw)_mm512_maddubs_epi16((__m512i)w, (__m512i)x), vw{} + 1);
}
#endif
// As `dot` of weights below 64, times their row's scale (a word, in all words).
INLINE vi dot_scaled(vi sum, vb w, vb x, vw scale) {
    return dot_words(sum, (vw)_mm512_maddubs_epi16((__m512i)w, (__m512i)x), scale);
}

// The sum of each row's four lanes.
INLINE void fold(vf v, float* sums) {
    __m512 a = (__m512)v;
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
    _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, a)));
}

#elif defined(__AVX2__)

INLINE vb repeat16(const void* p) { return (vb)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE vb load16(const Rows& rows, int64_t offset) {
    return (vb)_mm256_loadu2_m128i((const __m128i*)rows.at(1, offset), (const __m128i*)rows.at(0, offset));
}
INLINE vb load4(const Rows& rows, int64_t offset) {
    return (vb)_mm256_setr_m128i(_mm_set1_epi32(read<int32_t>(rows.at(0, offset))),
                                 _mm_set1_epi32(read<int32_t>(rows.at(1, offset))));
}
INLINE void load_halves(const Rows& rows, int64_t offset, vf& first, vf& second) {
    const __m256 pairs = _mm256_cvtph_ps(_mm_unpacklo_epi64(
        _mm_set1_epi32(read<int32_t>(rows.at(0, offset))), _mm_set1_epi32(read<int32_t>(rows.at(1, offset)))));
    first = (vf)_mm256_moveldup_ps(pairs);
    second = (vf)_mm256_movehdup_ps(pairs);
}
INLINE vb shuffle(vb v, vb index) { return (vb)_mm256_shuffle_epi8((__m256i)v, (__m256i)index); }
INLINE vw widen(vb v, int half) {
    const __m256i b = (__m256i)v;
    return (vw)(half ? _mm256_unpackhi_epi8(b, b) : _mm256_unpacklo_epi8(b, b)) >> 8;
}
INLINE vi dot_words(vi sum, vw a, vw b) { return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
template <bool SIGNED>
INLINE vi dot(vi sum, vb w, vb x) {
    if (SIGNED) {
        x = (vb)_mm256_sign_epi8((__m256i)x, (__m256i)w);
        w = (vb)_mm256_abs_epi8((__m256i)w);
    }
    return dot_words(sum, (vw)_mm256_maddubs_epi16((__m256i)w, (__m256i)x), vw{} + 1);
}
INLINE vi dot_scaled(vi sum, vb w, vb x, vw scale) {
    return dot_words(sum, (vw)_mm256_maddubs_epi16((__m256i)w, (__m256i)x), scale);
}
INLINE void fold(vf v, float* sums) {
    __m256 a = (__m256)v;
    a = _mm256_add_ps(a, _mm256_permute_ps(a, 0x4e));
    a = _mm256_add_ps(a, _mm256_permute_ps(a, 0xb1));
    sums[0] = _mm256_cvtss_f32(a);
    sums[1] = _mm_cvtss_f32(_mm256_extractf128_ps(a, 1));
}

#else

INLINE vb repeat16(const void* p) { return read<vb>(p); }
INLINE vb load16(const Rows& rows, int64_t offset) { return read<vb>(rows.at(0, offset)); }
INLINE vb load4(const Rows& rows, int64_t offset) { return (vb)(vi{} + read<int32_t>(rows.at(0, offset))); }
INLINE void load_halves(const Rows& rows, int64_t offset, vf& first, vf& second) {
    first = splat(half(rows.at(0, offset)));
    second = splat(half(rows.at(0, offset + 2)));
}
INLINE void fold(vf v, float* sums) { *sums = (v[0] + v[2]) + (v[1] + v[3]); }
#if defined(__ARM_NEON)
INLINE vb shuffle(vb v, vb index) { return (vb)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)index); }
#else
INLINE vb shuffle(vb v, vb index) {
    uint8_t bytes[16], from[16], moved[16];
    memcpy(bytes, &v, 16);
    memcpy(from, &index, 16);
    for (int i = 0; i < 16; i++) moved[i] = bytes[from[i] & 15];
    return read<vb>(moved);
}
#endif
INLINE vw widen(vb v, int half) {
    int8_t bytes[16];
    int16_t words[8];
    memcpy(bytes, &v, 16);
    for (int i = 0; i < 8; i++) words[i] = bytes[8 * half + i];
    return read<vw>(words);
}
INLINE vi low_words(vw v) { return (vi)v << 16 >> 16; }
INLINE vi high_words(vw v) { return (vi)v >> 16; }
INLINE vi dot_words(vi sum, vw a, vw b) {
    return sum + low_words(a) * low_words(b) + high_words(a) * high_words(b);
}
template <bool SIGNED>
INLINE vi dot(vi sum, vb w, vb x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
#else
    // Two products fit a word.
    const vw even = SIGNED ? (vw)w << 8 >> 8 : (vw)((vuw)w & 255), odd = (vw)w >> 8;
    const vw pairs = even * ((vw)x << 8 >> 8) + odd * ((vw)x >> 8);
    return sum + low_words(pairs) + high_words(pairs);
#endif
}
INLINE vi dot_scaled(vi sum, vb w, vb x, vw scale) { return sum + dot<false>(vi{}, w, x) * high_words(scale); }

#endif

// A row's word `i` in all its words.
INLINE vw spread(vw v, int i) {
#if defined(__AVX2__)
    static const uint16_t index[8] = {0x0100, 0x0302, 0x0504, 0x0706, 0x0908, 0x0b0a, 0x0d0c, 0x0f0e};
    return (vw)shuffle((vb)v, (vb)(vuw{} + index[i]));
#else
    return vw{} + v[i];
#endif
}

}  // namespace
