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

INLINE vi low_words(vw v) { return (vi)v << 16 >> 16; }
INLINE vi high_words(vw v) { return (vi)v >> 16; }

// Adds the products of unsigned and signed bytes, four to a lane. In plain vector words, for any bytes.
INLINE vi dot_plain(vi sum, vb u, vb s) {
    const vw even = (vw)((vuw)u & 255) * ((vw)s << 8 >> 8), odd = (vw)((vuw)u >> 8) * ((vw)s >> 8);
    return sum + low_words(even) + high_words(even) + low_words(odd) + high_words(odd);
}

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
// Adds the products of unsigned and signed bytes, four to a lane; unsigned ones are below 64 unless WIDE.
template <bool WIDE>
INLINE vi dot(vi sum, vb u, vb s) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
}
INLINE vi dot_words(vi sum, vw a, vw b) {
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#else
INLINE vi dot_words(vi sum, vw a, vw b) { return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
template <bool WIDE>
INLINE vi dot(vi sum, vb u, vb s) {
    if (WIDE) return dot_plain(sum, u, s);
    return dot_words(sum, (vw)_mm512_maddubs_epi16((__m512i)u, (__m512i)s), vw{} + 1);
}
#endif
// Adds the products of unsigned bytes below 64, signed bytes and their row's scale (a word, in all words).
INLINE vi dot_scaled(vi sum, vb u, vb s, vw scale) {
    return dot_words(sum, (vw)_mm512_maddubs_epi16((__m512i)u, (__m512i)s), scale);
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
template <bool WIDE>
INLINE vi dot(vi sum, vb u, vb s) {
    if (WIDE) return dot_plain(sum, u, s);
    return dot_words(sum, (vw)_mm256_maddubs_epi16((__m256i)u, (__m256i)s), vw{} + 1);
}
INLINE vi dot_scaled(vi sum, vb u, vb s, vw scale) {
    return dot_words(sum, (vw)_mm256_maddubs_epi16((__m256i)u, (__m256i)s), scale);
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
    vb moved;
    for (int i = 0; i < 16; i++) moved[i] = v[index[i] & 15];
    return moved;
}
#endif
INLINE vw widen(vb v, int half) {
    int8_t bytes[16];
    int16_t words[8];
    memcpy(bytes, &v, 16);
    for (int i = 0; i < 8; i++) words[i] = bytes[8 * half + i];
    return read<vw>(words);
}
INLINE vi dot_words(vi sum, vw a, vw b) {
    return sum + low_words(a) * low_words(b) + high_words(a) * high_words(b);
}
template <bool WIDE>
INLINE vi dot(vi sum, vb u, vb s) {
#if defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t in = (int8x16_t)s;
    if (!WIDE) return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)u, in);
    const int8x16_t half_offset = vdupq_n_s8(64);  // u is (u - 128) + 64 + 64
    const int32x4_t centred = vdotq_s32((int32x4_t)sum, (int8x16_t)(u ^ 128), in);
    return (vi)vdotq_s32(vdotq_s32(centred, half_offset, in), half_offset, in);
#else
    return dot_plain(sum, u, s);
#endif
}
INLINE vi dot_scaled(vi sum, vb u, vb s, vw scale) { return sum + dot<false>(vi{}, u, s) * high_words(scale); }

#endif

}  // namespace
