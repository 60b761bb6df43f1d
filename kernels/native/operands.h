// Products of whole numbers, exact: bytes of weights times inputs of 16 or 8 bits.
//
// Weights are unpacked to bytes q from 0 to 255, four columns in a lane, and mean q - OFFSET. Words multiply two columns
// at a time. Planes multiply four, on machines that multiply bytes, and split each input into 256 * high + low. AVX2
// multiplies bytes, too, but adds up the products in 16 bits, which only types of small q have room in. Crossed, on
// AVX2, needs half the products of words. Bytes are for inputs of 8 bits, with half the steps of planes. All schemes
// give the same numbers. Sums wrap around, so that only the last has to fit.
//
// A vector of weights makes HALVES operands; `arrange` orders inputs as `mac` reads them, QUAD bytes for every four
// columns; `start` is the first value of a run's sum, from what is known of its inputs (`Known`), and `total` its value.
// What a scheme wants to know besides their sum, its `Besides` finds for each 16 of 32 columns, and `of` a run.
#pragma once
#include <type_traits>

#include "bands.h"
#include "product.h"

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#define SHOAL_CROSSED 1
#endif

namespace {

// Adds the products of two words in every lane.
INLINE vi dot_words(vi sum, vw a, vw b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
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

// What is known of the inputs of a run: their sum, and what a scheme found besides.
struct Known {
    int32_t sum, besides;
};

struct Nothing {
    static constexpr bool FOUND = false;
};

// Where one instruction multiplies and adds, one token's sum is CHAINS sums, so as not to wait for each product.
#if defined(__AVX512F__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int SIDE_BY_SIDE = 2;
#else
constexpr int SIDE_BY_SIDE = 1;
#endif

struct Words {
    static constexpr int HALVES = 2, QUAD = 8, CHAINS = SIDE_BY_SIDE;  // halves: even and odd columns
    static constexpr bool CROSSED = false;
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

#if defined(SHOAL_CROSSED)
    // What `Crossed` takes away for 16 columns and for all, negative.
    struct Besides {
        static constexpr bool FOUND = true;
        int32_t own[3];
        INLINE void find(const char (*q)[QUAD]) {
            const uint32_t halves[2] = {products(q), products(q + 4)};
            for (int i = 0; i < 2; i++) own[i] = (int32_t)(0 - halves[i]);
            own[2] = (int32_t)(0 - halves[0] - halves[1]);
        }
        static INLINE uint32_t products(const char (*x)[QUAD]) {
            __m128i sum = _mm_setzero_si128();
            for (int i = 0; i < 4; i += 2) {
                const __m128i words = read<__m128i>(x[i]);
                sum = _mm_add_epi32(sum, _mm_madd_epi16(words, _mm_srli_epi64(words, 32)));
            }
            return (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum)));
        }
    };
#else
    typedef Nothing Besides;
#endif
};

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
    static constexpr bool CROSSED = false;
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
        return {};
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
    static constexpr bool CROSSED = false;
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
    static constexpr bool CROSSED = false;
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
        return {};
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
    static constexpr bool CROSSED = false;
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

#if defined(SHOAL_CROSSED)

// Of columns 0 and 1, x0 * w0 + x1 * w1 = (x0 + w1) * (x1 + w0) - x0 * x1 - w0 * w1 (S. Winograd, 1968). What is taken
// away is worked out once for every token and once for every row, so one product does the work of two, and sums of words
// take the place of the other; these go twice as fast as products, or faster. x + w fits 16 bits.
struct Crossed {
    static constexpr int HALVES = 1, QUAD = Words::QUAD;
    static constexpr bool CROSSED = true;
    struct Half {
        vw even, odd;
    };
    typedef Words::Sum Sum;
    typedef Words::Besides Besides;

    template <class W>
    static INLINE void halve(vb q, Half* out) {
        out[0] = {(vw)((vuw)q & 255) - (int16_t)W::OFFSET, (vw)((vuw)q >> 8) - (int16_t)W::OFFSET};
    }
    // What is taken away for four columns of a row.
    static INLINE vi own(const Half& w) { return Words::whole(Words::dot(Words::begin(vi{}), w.even, w.odd)); }
    static INLINE Sum mac(const Sum& sum, const Half& w, const char* x, int) {
        return Words::dot(sum, w.odd + splat_words(x), w.even + splat_words(x + 4));
    }
    template <class W>
    static INLINE vi total(const Sum& sum, const Known&) {
        return Words::whole(sum);
    }
};

#endif

// Inputs of 16 bits, and the schemes for few tokens, which use the stored bytes, and for many, which use unpacked ones.
// Where a machine has both, planes unpack faster and words add up faster.
struct Bits16 {
    static constexpr float MOST = 32639;  // 256 * 127 + 127: both halves of a number fit signed bytes
#if defined(__ARM_FEATURE_DOTPROD)
    template <class W>
    using Few = Planes;
    template <class W>
    using Many = Planes;
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    template <class W>
    using Few = Planes;
    template <class W>
    using Many = Words;
#elif defined(SHOAL_CROSSED)
    template <class W>
    using Few = std::conditional_t<(2 * W::TOP * 128 * W::QUADS < 1 << 15), Planes, Words>;
    template <class W>
    using Many = Crossed;
#else
    template <class W>
    using Few = Words;
    template <class W>
    using Many = Words;
#endif
    template <class Scheme>
    static constexpr Form form() {
        return Scheme::QUAD == 8 && std::is_same_v<typename Scheme::Half, vb> ? PLANES : WORDS;
    }
};

struct Bits8 {
    static constexpr float MOST = 127;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
    template <class W>
    using Few = Bytes;
    template <class W>
    using Many = Bytes;
#elif defined(__AVX2__) || defined(__ARM_NEON)
    template <class W>
    using Few = std::conditional_t<Bytes::FITS<W>, Bytes, Words>;
    template <class W>
    using Many = std::conditional_t<Bytes::FITS<W>, Bytes, Bits16::Many<W>>;
#else
    template <class W>
    using Few = Words;
    template <class W>
    using Many = Words;
#endif
    template <class Scheme>
    static constexpr Form form() {
        return Scheme::QUAD == 4 ? BYTES : BYTES_AS_WORDS;
    }
};

}  // namespace
