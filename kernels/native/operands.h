// Products of whole numbers, exact: bytes of weights times inputs of 16 or 8 bits.
//
// Weights are unpacked to bytes q from 0 to 255, four columns in a lane, and mean q - OFFSET. Words multiply two columns
// at a time. Planes multiply four, on machines that multiply bytes, and split each input into 256 * high + low. AVX2
// multiplies bytes, too, but adds up the products in 16 bits, which only types of small q have room in. Bytes are for
// inputs of 8 bits, with half the steps of planes. All schemes give the same numbers. Sums wrap around, so that only the
// last has to fit.
//
// A vector of weights makes HALVES operands; `arrange` orders inputs as `mac` reads them, QUAD bytes for every four
// columns; `start` is the first value of a run's sum, from what is known of its inputs (`Known`), and `total` its value.
// What a scheme wants to know besides their sum, its `Besides` finds for each 16 of 32 columns, and `of` a run.
#pragma once
#include "byte_products.h"
#include "product.h"

namespace {

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
    using Many = SignedWords;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    template <class W>
    using Few = std::conditional_t<(2 * W::TOP * 128 * W::QUADS < 1 << 15), Planes, Words>;
    template <class W>
    using Many = SignedWords;
#else
    template <class W>
    using Few = Words;
    template <class W>
    using Many = SignedWords;
#endif
    template <class Scheme>
    static constexpr Form form() {
        return Scheme::QUAD == 8 && std::is_same_v<typename Scheme::Half, vb> ? PLANES : WORDS;
    }
};

// Of 14 bits, beside weights of as many: words of bf16 (`linear_bf16.h`).
struct Bits14 {
    static constexpr float MOST = 8159;  // 32 products of it and 8160 add up to less than 2^31
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
    using Many = SignedWords;
#endif
    template <class Scheme>
    static constexpr Form form() {
        return Scheme::QUAD == 4 ? BYTES : BYTES_AS_WORDS;
    }
};

}  // namespace
