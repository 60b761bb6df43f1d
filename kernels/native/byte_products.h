// Products of bytes: `Bytes` for inputs of 8 bits, `Planes` for those of 16, split into 256 * high + low (`operands.h`).
#pragma once
#include "word_products.h"

namespace {

// Bytes of inputs, in order.
INLINE void arrange_bytes(vi x, char* out) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    const bytes all = __builtin_convertvector(x, bytes);
    memcpy(out, &all, sizeof all);
}

// The high bytes of four columns, then the low ones.
INLINE void arrange_planes(vi x, char* out) {
    char high[LANES], low[LANES];
    arrange_bytes((x + 128) >> 8, high);
    arrange_bytes(x, low);
    for (int i = 0; i < LANES; i += 4) {
        memcpy(out + 2 * i, high + i, 4);
        memcpy(out + 2 * i + 4, low + i, 4);
    }
}

// What machines that multiply bytes and add up in 32 bits do in one instruction: four products in every lane.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)

struct Bytes {
    static constexpr int HALVES = 1, QUAD = 4, CHAINS = SIDE_BY_SIDE;
    typedef vb Half;
    typedef vi Sum;
    typedef Nothing Besides;

#if defined(__ARM_FEATURE_DOTPROD)
    template <class W>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q - (uint8_t)W::OFFSET;  // this machine multiplies signed bytes only
    }
    template <class W>
    static INLINE Sum start(const Known&) {
        return Sum{};
    }
#else
    template <class W>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q;
    }
    template <class W>
    static INLINE Sum start(const Known& of) {
        return vi{} - W::OFFSET * of.sum;
    }
#endif
    static INLINE Sum mac(Sum sum, Half w, const char* x, int) {
        const int32_t four = read<int32_t>(x);
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four));
#elif defined(__AVXVNNI__)
        return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(four));
#else
        return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(four)));
#endif
    }
    template <class W>
    static INLINE vi total(Sum sum, const Known&) {
        return sum;
    }
    static INLINE void arrange(vi x, char* out) { arrange_bytes(x, out); }
};

struct Planes {
    static constexpr int HALVES = 1, QUAD = 8, CHAINS = SIDE_BY_SIDE;
    typedef vb Half;
    typedef Nothing Besides;
    struct Sum {
        vi high, low;
    };
    template <class W>
    static INLINE void halve(vb q, Half* out) {
        Bytes::halve<W>(q, out);
    }
    template <class W>
    static INLINE Sum start(const Known& of) {
        return {vi{}, Bytes::start<W>(of)};
    }
    static INLINE Sum mac(const Sum& sum, Half w, const char* x, int) {
        return {Bytes::mac(sum.high, w, x, 0), Bytes::mac(sum.low, w, x + 4, 0)};
    }
    template <class W>
    static INLINE vi total(const Sum& sum, const Known&) {
        return (sum.high << 8) + sum.low;
    }
    static INLINE void arrange(vi x, char* out) { arrange_planes(x, out); }
};

// Machines that add up products of bytes in 16 bits: sums of two columns (x86) or of one (NEON) in every word, widened
// at the end of a run. Weights count from CENTRE, so that these sums fit; the rest of OFFSET is added at the end.
#elif defined(__AVX2__) || defined(__ARM_NEON)

struct Bytes {
    static constexpr int HALVES = 1, QUAD = 4, CHAINS = 1;
    typedef vb Half;

    template <class W>
    static constexpr int CENTRE = W::OFFSET || W::TOP < 16 ? W::OFFSET : (W::TOP + 1) / 2;
    template <class W>
    static constexpr int FURTHEST = CENTRE<W> > W::TOP - CENTRE<W> ? CENTRE<W> : W::TOP - CENTRE<W>;

#if defined(__AVX2__)
    template <class W>
    static constexpr bool FITS = 127 * 2 * W::TOP < 1 << 15 && 127 * 2 * FURTHEST<W> * W::QUADS < 1 << 15;
    typedef vw Sum;
    // The sums of the inputs that a word's products are of: two words for 16 columns, and for all.
    struct Besides {
        static constexpr bool FOUND = true;
        int32_t own[3];
        INLINE void find(const char (*q)[QUAD]) {
            const __m256i words = _mm256_maddubs_epi16(_mm256_set1_epi8(1), read<__m256i>(q));
            const __m128i first = _mm256_castsi256_si128(words), second = _mm256_extracti128_si256(words, 1);
            own[0] = folded(first);
            own[1] = folded(second);
            own[2] = folded(_mm_add_epi16(first, second));
        }
        static INLINE int32_t folded(__m128i v) {
            v = _mm_add_epi16(v, _mm_unpackhi_epi64(v, v));
            return _mm_cvtsi128_si32(_mm_add_epi16(v, _mm_srli_epi64(v, 32)));
        }
    };
    template <class W>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q;
    }
    template <class W>
    static INLINE Sum start(const Known& of) {
        return CENTRE<W> ? (vw)(vi{} + of.besides) * (int16_t)-CENTRE<W> : vw{};
    }
#if defined(__AVX512F__)
    static INLINE Sum mac(Sum sum, Half w, const char* x, int) {
        return done(sum + (vw)_mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(read<int32_t>(x))));
    }
    static INLINE vi widened(Sum sum) { return (vi)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)); }
#else
    static INLINE Sum mac(Sum sum, Half w, const char* x, int) {
        return done(sum + (vw)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(read<int32_t>(x))));
    }
    static INLINE vi widened(Sum sum) { return (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#endif
#else
    template <class W>
    static constexpr bool FITS = 127 * FURTHEST<W> * W::QUADS < 1 << 15;
    typedef Nothing Besides;
    struct Sum {
        int16x8_t first, second;  // of two rows each, with four numbers for a row
    };
    template <class W>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q - (uint8_t)CENTRE<W>;
    }
    template <class W>
    static INLINE Sum start(const Known&) {
        return Sum{};
    }
    static INLINE Sum mac(const Sum& sum, Half w, const char* x, int) {
        const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(x)));
        return {vmlal_s8(sum.first, vget_low_s8((int8x16_t)w), vget_low_s8(inputs)),
                vmlal_high_s8(sum.second, (int8x16_t)w, inputs)};
    }
    static INLINE vi widened(const Sum& sum) {
        return (vi)vpaddq_s32(vpaddlq_s16(sum.first), vpaddlq_s16(sum.second));
    }
#endif
    template <class W>
    static INLINE vi total(const Sum& sum, const Known& of) {
        return CENTRE<W> == W::OFFSET ? widened(sum) : widened(sum) + (CENTRE<W> - W::OFFSET) * of.sum;
    }
    static INLINE void arrange(vi x, char* out) { arrange_bytes(x, out); }
};

#if defined(__AVX2__) && !defined(__AVX512F__)

struct Planes {
    static constexpr int HALVES = 1, QUAD = 8, CHAINS = 1;
    typedef vb Half;
    typedef Nothing Besides;
    struct Sum {
        vw high, low;  // in words of 16 bits, for two columns each
        vi first;
    };
    template <class W>
    static INLINE void halve(vb q, Half* out) {
        out[0] = q;
    }
    template <class W>
    static INLINE Sum start(const Known& of) {
        return {vw{}, vw{}, vi{} - W::OFFSET * of.sum};
    }
    static INLINE Sum mac(const Sum& sum, Half w, const char* x, int) {
        return {Bytes::mac(sum.high, w, x, 0), Bytes::mac(sum.low, w, x + 4, 0), sum.first};
    }
    template <class W>
    static INLINE vi total(const Sum& sum, const Known&) {
        const __m256i high = _mm256_madd_epi16((__m256i)sum.high, _mm256_set1_epi16(256));
        return (vi)high + Bytes::widened(sum.low) + sum.first;
    }
    static INLINE void arrange(vi x, char* out) { arrange_planes(x, out); }
};

#else
typedef Words Planes;
#endif
#else
typedef Words Bytes, Planes;
#endif

}  // namespace
