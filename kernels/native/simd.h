// A thin layer over the vector registers of the machine this file is compiled for.
//
// Knows lanes, loads, widening and the one order in which lanes are summed. Knows nothing of weight
// types. Vectors are GCC/Clang vector extensions, so + - * / & | << >> work on them; intrinsics are
// used only where the extension has nothing or compilers do badly. Everything is in an anonymous namespace:
// the same source is compiled for several machines, which must not share any inline function.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TOKENS = 6;  // tokens per register tile: 4 * 6 sums, 4 weights, 1 input of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TOKENS = 3;  // 4 * 3 sums, 3 inputs, 1 weight of 16 registers
#elif defined(__ARM_NEON)
constexpr int LANES = 4;
constexpr int TOKENS = 5;  // 4 * 5 sums of 32 registers
#else
constexpr int LANES = 4;
constexpr int TOKENS = 2;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vf4 __attribute__((vector_size(16)));

template <class T>
INLINE T read(const void* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

// v, computed here and not later. GCC puts off a chain of whole sums until its end is used, and keeps all that is to be
// added on the stack until then.
template <class V>
INLINE V done(V v) {
#if defined(__SSE2__)
    asm("" : "+x"(v));
#endif
    return v;
}

// v, in a register from here on. GCC would read it from memory again for each use.
template <class V>
INLINE V held(V v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#endif
    return v;
}

// p, of which the compiler forgets what lies there, so that it reads where it computes. Else it reads all that a loop
// uses again before the loop, and keeps it on the stack.
template <class T>
INLINE const T* unknown(const T* p) {
    asm("" : "+r"(p));
    return p;
}

INLINE vf load(const float* p) { return read<vf>(p); }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
INLINE vf bits_to_float(vi v) { return (vf)v; }

// IEEE half to float without hardware: the exponent is rebased by a multiplication, which also
// renormalises subnormals; then infinities and NaN are put back.
INLINE float half_bits_to_float(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    float value = read<float>(&magnitude) * 0x1p112f;
    uint32_t bits = read<uint32_t>(&value);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= (uint32_t)(h & 0x8000) << 16;
    return read<float>(&bits);
}

// Float to IEEE half, to the nearest, ties to even. For subnormals the float adder rounds.
INLINE uint16_t float_to_half_bits(float f) {
    uint32_t magnitude = read<uint32_t>(&f) & 0x7fffffff;
    const uint16_t sign = (uint16_t)((read<uint32_t>(&f) & 0x80000000) >> 16);
    if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more is infinity
    if (magnitude < 0x38800000) {                       // units of 2^-24, as around 1/2
        const float sum = read<float>(&magnitude) + 0.5f;
        return sign | (uint16_t)(read<uint32_t>(&sum) - 0x3f000000);
    }
    magnitude += 0xc8000fff + (magnitude >> 13 & 1);
    return sign | (uint16_t)(magnitude >> 13);
}

#if defined(__AVX512F__)

INLINE vf splat(float f) { return (vf)_mm512_set1_ps(f); }
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf round(vf a) {
    return (vf)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vi to_int(vf a) { return (vi)_mm512_cvtps_epi32((__m512)a); }
INLINE vi load_u16(const uint8_t* p) {
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
INLINE vf load_half(const uint8_t* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_half(uint8_t* p, vf v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vi load_i8(const uint8_t* p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_u16(uint8_t* p, vi v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v)); }
INLINE void store_i8(uint8_t* p, vi v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
INLINE float greatest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
// The sums of four vectors; lanes are added in the same order in each of the four.
INLINE vf4 sum4(vf a, vf b, vf c, vf d) {
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44),
                              _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0x44),
                              _mm512_shuffle_f32x4((__m512)c, (__m512)d, 0xee));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    abcd = _mm512_add_ps(abcd, _mm512_permute_ps(abcd, 0x4e));
    abcd = _mm512_add_ps(abcd, _mm512_permute_ps(abcd, 0xb1));
    return (vf4)_mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, abcd));
}

#elif defined(__AVX2__)

INLINE vf splat(float f) { return (vf)_mm256_set1_ps(f); }
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf round(vf a) {
    return (vf)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vi to_int(vf a) { return (vi)_mm256_cvtps_epi32((__m256)a); }
INLINE vi load_u16(const uint8_t* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE vf load_half(const uint8_t* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_half(uint8_t* p, vf v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vi load_i8(const uint8_t* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE vf4 sum4(vf a, vf b, vf c, vf d) {
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20),
                              _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31));
    __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps((__m256)c, (__m256)d, 0x20),
                              _mm256_permute2f128_ps((__m256)c, (__m256)d, 0x31));
    __m256 pairs = _mm256_hadd_ps(ab, cd);     // a c | b d, two halves each
    __m256 sums = _mm256_hadd_ps(pairs, pairs);  // a c a c | b d b d
    return (vf4)_mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

#else

#if defined(__ARM_NEON)
INLINE vf splat(float f) { return (vf)vdupq_n_f32(f); }
INLINE vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vf min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vf max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
#else
INLINE vf splat(float f) { return vf{f, f, f, f}; }
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
#endif
// To the nearest integer: adding 1.5 * 2^23 leaves no bits for a fraction. For |a| < 2^22.
INLINE vf round(vf a) {
    const vf magic = splat(0x1.8p23f);
    return (a + magic) - magic;
}
INLINE vi to_int(vf a) { return __builtin_convertvector(round(a), vi); }
INLINE vi load_u16(const uint8_t* p) {
    return vi{read<uint16_t>(p), read<uint16_t>(p + 2), read<uint16_t>(p + 4), read<uint16_t>(p + 6)};
}
#if defined(__ARM_NEON)
INLINE vf load_half(const uint8_t* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
INLINE void store_half(uint8_t* p, vf v) { vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32((float32x4_t)v))); }
#else
INLINE vf load_half(const uint8_t* p) {
    return vf{half_bits_to_float(read<uint16_t>(p)), half_bits_to_float(read<uint16_t>(p + 2)),
              half_bits_to_float(read<uint16_t>(p + 4)), half_bits_to_float(read<uint16_t>(p + 6))};
}
INLINE void store_half(uint8_t* p, vf v) {
    for (int i = 0; i < LANES; i++) {
        const uint16_t bits = float_to_half_bits(v[i]);
        memcpy(p + 2 * i, &bits, sizeof bits);
    }
}
#endif
INLINE vi load_i8(const uint8_t* p) {
    return vi{read<int8_t>(p), read<int8_t>(p + 1), read<int8_t>(p + 2), read<int8_t>(p + 3)};
}
INLINE vf4 sum4(vf a, vf b, vf c, vf d) {
    return vf4{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
               (d[0] + d[2]) + (d[1] + d[3])};
}

#endif

#if !defined(__AVX512F__)
INLINE float greatest(vf v) {
    float lanes[LANES];
    store(lanes, v);
    for (int i = LANES / 2; i > 0; i /= 2) {
        for (int j = 0; j < i; j++) lanes[j] = lanes[j] > lanes[j + i] ? lanes[j] : lanes[j + i];
    }
    return lanes[0];
}
INLINE void store_u16(uint8_t* p, vi v) {
    typedef uint16_t narrow __attribute__((vector_size(LANES * 2)));
    const narrow low = __builtin_convertvector(v, narrow);
    memcpy(p, &low, sizeof low);
}
INLINE void store_i8(uint8_t* p, vi v) {
    typedef int8_t narrow __attribute__((vector_size(LANES)));
    const narrow low = __builtin_convertvector(v, narrow);
    memcpy(p, &low, sizeof low);
}
#endif

INLINE float read_float(int32_t bits) { return read<float>(&bits); }

// The greatest lane, and the sum of all.
#if defined(__AVX512F__)
INLINE int32_t greatest(vi v) { return _mm512_reduce_max_epi32((__m512i)v); }
INLINE int32_t sum_of(vi v) { return _mm512_reduce_add_epi32((__m512i)v); }
#elif defined(__AVX2__)
INLINE int32_t greatest(vi v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
INLINE int32_t sum_of(vi v) {
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
#else
INLINE int32_t greatest(vi v) {
    const int32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}
INLINE int32_t sum_of(vi v) { return v[0] + v[1] + v[2] + v[3]; }
#endif

// e^x within 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf).
INLINE vf exp(vf x) {
    x = min(splat(88.0f), max(splat(-87.0f), x));  // in this order a NaN stays one
    const vf n = round(x * splat(1.44269504f));
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return p * bits_to_float((to_int(n) + 127) << 23);
}

}  // namespace
