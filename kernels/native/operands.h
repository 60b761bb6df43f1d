// Products of whole numbers, exact: bytes of weights times inputs of 16 bits.
//
// Weights are unpacked to bytes q from 0 to 255, four columns in a lane, and mean q - OFFSET. There are three schemes.
// Words multiply two columns at a time. Planes multiply four, on machines that multiply bytes, and split each input
// into 256 * high + low. AVX2 multiplies bytes, too, but adds up the products in 16 bits, which only types of small q
// have room in. Crossed, on AVX2, needs half the products of words. A vector of weights makes HALVES operands;
// `arrange` orders inputs as `mac` reads them, eight bytes for every four columns; `start` is the first value of a sum
// over columns, from what is known of their inputs. All schemes give the same numbers. Sums wrap around, so that only
// the last has to fit.
#pragma once
#include <type_traits>

#include "bands.h"

namespace {

// Adds the products of two words in every lane.
INLINE vi dot_words(vi sum, vw a, vw b) {
#if defined(__AVX512VNNI__)
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // of the intrinsic GCC makes copies of sums
    return sum;
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX512F__)
    return done(wrapped_sum(sum, (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b)));
#elif defined(__AVX2__)
    return done(wrapped_sum(sum, (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b)));
#elif defined(__SSE2__)
    return done(wrapped_sum(sum, (vi)_mm_madd_epi16((__m128i)a, (__m128i)b)));
#else
    return sum + ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

// Two words for every lane.
INLINE vw splat_words(const char* x) { return (vw)(vi{} + read<int32_t>(x)); }

struct Words {
    static constexpr int HALVES = 2;  // even and odd columns
    typedef vw Half;

    template <int OFFSET>
    static INLINE void halve(vb q, Half* out) {
        out[0] = (vw)((vuw)q & 255);
        out[1] = (vw)((vuw)q >> 8);
    }

    // `begin`: a sum whose total is v. `dot`: adds products.
#if defined(__ARM_NEON)
    struct Sum {
        vi first, second;  // of two rows each, with two numbers for a row
    };
    static INLINE Sum begin(vi v) {
        return {(vi)vzip1q_s32((int32x4_t)v, int32x4_t{}), (vi)vzip2q_s32((int32x4_t)v, int32x4_t{})};
    }
    static INLINE Sum dot(const Sum& sum, vw w, vw x) {
        const int16x8_t a = (int16x8_t)w, b = (int16x8_t)x;
        return {(vi)vmlal_s16((int32x4_t)sum.first, vget_low_s16(a), vget_low_s16(b)),
                (vi)vmlal_high_s16((int32x4_t)sum.second, a, b)};
    }
    static INLINE vi total(const Sum& sum) { return (vi)vpaddq_s32((int32x4_t)sum.first, (int32x4_t)sum.second); }
#else
    typedef vi Sum;
    static INLINE Sum begin(vi v) { return v; }
    static INLINE Sum dot(Sum sum, vw w, vw x) { return dot_words(sum, w, x); }
    static INLINE vi total(Sum sum) { return sum; }
#endif

    template <int OFFSET>
    static INLINE Sum start(int32_t sum) {
        return begin(vi{} - OFFSET * sum);
    }
    static INLINE Sum mac(const Sum& sum, Half w, const char* x, int half) { return dot(sum, w, splat_words(x + 4 * half)); }

    static INLINE void arrange(vi x, char* out) {
        typedef int16_t words __attribute__((vector_size(LANES * 2)));
        typedef uint64_t quads __attribute__((vector_size(LANES * 2)));
        const quads q = (quads)__builtin_convertvector(x, words);  // of 0, 1, 2, 3 become 0, 2, 1, 3
        const quads even_odd = (q & 0xffff00000000ffff) | (q & 0xffff0000) << 16 | (q >> 16 & 0xffff0000);
        memcpy(out, &even_odd, sizeof even_odd);
    }
};

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD) || (defined(__AVX2__) && !defined(__AVX512F__))

struct Planes {
    static constexpr int HALVES = 1;
    typedef vb Half;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    struct Sum {
        vi high, low;
    };
    template <int OFFSET>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q;
    }
    template <int OFFSET>
    static INLINE Sum start(int32_t sum) {
        return {vi{}, vi{} - OFFSET * sum};
    }
    static INLINE Sum mac(Sum sum, Half w, const char* x, int) {
        return {dot_bytes(sum.high, w, x), dot_bytes(sum.low, w, x + 4)};
    }
    static INLINE vi dot_bytes(vi sum, vb w, const char* x) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(read<int32_t>(x)));
#else
        return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(read<int32_t>(x)));
#endif
    }
    static INLINE vi total(const Sum& sum) { return (sum.high << 8) + sum.low; }
#elif defined(__ARM_FEATURE_DOTPROD)
    struct Sum {
        vi high, low;
    };
    template <int OFFSET>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q - (uint8_t)OFFSET;  // this machine multiplies signed bytes only
    }
    template <int OFFSET>
    static INLINE Sum start(int32_t) {
        return {vi{}, vi{}};
    }
    static INLINE Sum mac(Sum sum, Half w, const char* x, int) {
        const int8x8_t inputs = vld1_s8((const int8_t*)x);
        return {(vi)vdotq_lane_s32((int32x4_t)sum.high, (int8x16_t)w, inputs, 0),
                (vi)vdotq_lane_s32((int32x4_t)sum.low, (int8x16_t)w, inputs, 1)};
    }
    static INLINE vi total(const Sum& sum) { return (sum.high << 8) + sum.low; }
#else
    struct Sum {
        vw high, low;  // in words of 16 bits, for two columns each
        vi first;
    };
    template <int OFFSET>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q;
    }
    template <int OFFSET>
    static INLINE Sum start(int32_t sum) {
        return {vw{}, vw{}, vi{} - OFFSET * sum};
    }
    static INLINE Sum mac(Sum sum, Half w, const char* x, int) {
        return {done(sum.high + (vw)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(read<int32_t>(x)))),
                done(sum.low + (vw)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(read<int32_t>(x + 4)))), sum.first};
    }
    static INLINE vi total(const Sum& sum) {
        const __m256i high = _mm256_madd_epi16((__m256i)sum.high, _mm256_set1_epi16(256));
        return (vi)high + (vi)_mm256_madd_epi16((__m256i)sum.low, _mm256_set1_epi16(1)) + sum.first;
    }
#endif

    static INLINE void arrange(vi x, char* out) {
        typedef int8_t bytes __attribute__((vector_size(LANES)));
        const bytes high = __builtin_convertvector((x + 128) >> 8, bytes), low = __builtin_convertvector(x, bytes);
        for (int i = 0; i < LANES; i += 4) {
            memcpy(out + 2 * i, (const char*)&high + i, 4);
            memcpy(out + 2 * i + 4, (const char*)&low + i, 4);
        }
    }
};

#else

typedef Words Planes;

#endif

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#define SHOAL_CROSSED 1

// Of columns 0 and 1, x0 * w0 + x1 * w1 = (x0 + w1) * (x1 + w0) - x0 * x1 - w0 * w1 (S. Winograd, 1968). What is taken
// away is worked out once for every token and once for every row, so one product does the work of two, and sums of words
// take the place of the other; these go twice as fast as products, or faster. x + w fits 16 bits.
struct Crossed {
    static constexpr int HALVES = 1;
    struct Half {
        vw even, odd;
    };
    typedef Words::Sum Sum;

    template <int OFFSET>
    static INLINE void halve(vb q, Half* out) {
        out[0] = {(vw)((vuw)q & 255) - (int16_t)OFFSET, (vw)((vuw)q >> 8) - (int16_t)OFFSET};
    }
    // What is taken away for four columns of a row, and for 16 of a token that are arranged as words.
    static INLINE vi own(const Half& w) { return Words::total(Words::dot(Words::begin(vi{}), w.even, w.odd)); }
    static INLINE uint32_t own(const char (*x)[8]) {
        __m128i sum = _mm_setzero_si128();
        for (int i = 0; i < 4; i += 2) {
            const __m128i words = read<__m128i>(x[i]);
            sum = _mm_add_epi32(sum, _mm_madd_epi16(words, _mm_srli_epi64(words, 32)));
        }
        return (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum)));
    }
    static INLINE Sum mac(const Sum& sum, const Half& w, const char* x, int) {
        return Words::dot(sum, w.odd + splat_words(x), w.even + splat_words(x + 4));
    }
    static INLINE vi total(const Sum& sum) { return Words::total(sum); }
};

#endif

// The schemes for few tokens, which use the stored bytes, and for many, which use unpacked ones. Where a machine has
// both, planes unpack faster and words add up faster. TOP is the largest q of a type; a sum has four columns QUADS times.
#if defined(__ARM_FEATURE_DOTPROD)
template <int TOP, int QUADS>
using Few = Planes;
using Many = Planes;
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
template <int TOP, int QUADS>
using Few = Planes;
using Many = Words;
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <int TOP, int QUADS>
using Few = std::conditional_t<(2 * TOP * 128 * QUADS < 1 << 15), Planes, Words>;
using Many = Crossed;
#else
template <int TOP, int QUADS>
using Few = Words;
using Many = Words;
#endif

}  // namespace
