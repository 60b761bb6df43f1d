// Products of words, two columns at a time (`operands.h`).
#pragma once
#include "known_inputs.h"

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
    static constexpr int HALVES = 2, QUAD = 8, CHAINS = SIDE_BY_SIDE;  // halves: even and odd columns
    typedef vw Half;

    template <class W>
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
    static INLINE vi whole(const Sum& sum) { return (vi)vpaddq_s32((int32x4_t)sum.first, (int32x4_t)sum.second); }
#else
    typedef vi Sum;
    static INLINE Sum begin(vi v) { return v; }
    static INLINE Sum dot(Sum sum, vw w, vw x) { return dot_words(sum, w, x); }
    static INLINE vi whole(Sum sum) { return sum; }
#endif

    template <class W>
    static INLINE Sum start(const Known& of) {
        return begin(vi{} - W::OFFSET * of.sum);
    }
    static INLINE Sum mac(const Sum& sum, Half w, const char* x, int half) { return dot(sum, w, splat_words(x + 4 * half)); }
    template <class W>
    static INLINE vi total(const Sum& sum, const Known&) {
        return whole(sum);
    }

    static INLINE void arrange(vi x, char* out) {
        typedef int16_t words __attribute__((vector_size(LANES * 2)));
        typedef uint64_t quads __attribute__((vector_size(LANES * 2)));
        const quads q = (quads)__builtin_convertvector(x, words);  // of 0, 1, 2, 3 become 0, 2, 1, 3
        const quads even_odd = (q & 0xffff00000000ffff) | (q & 0xffff0000) << 16 | (q >> 16 & 0xffff0000);
        memcpy(out, &even_odd, sizeof even_odd);
    }
    typedef Nothing Besides;
};

// Words of weights that lose their OFFSET when they are unpacked: less to do where many tokens share that.
struct SignedWords : Words {
    template <class W>
    static INLINE void halve(vb q, Half* out) {
        out[0] = (vw)((vuw)q & 255) - (int16_t)W::OFFSET;
        out[1] = (vw)((vuw)q >> 8) - (int16_t)W::OFFSET;
    }
    template <class W>
    static INLINE Sum start(const Known&) {
        return begin(vi{});
    }
};

}  // namespace
