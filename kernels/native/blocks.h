// The weight types: how a block of bytes becomes lanes of float weights.
//
// Each type is a struct with `weights` and `bytes` per block and one `decode`, which hands the weights
// to `sink(at, lanes)` in ascending order of `at`, the index of the first lane within the block. The
// ascending order is a contract: with it a dot product that decodes as it goes and one over decoded
// rows add up in the same order. Every weight comes out as in `reference.py`, bit for bit where the
// machine has fused multiply-add. Layouts: ggml's block definitions.
#pragma once
#include "simd.h"

namespace {

// Reads `N` bytes into N / LANES integer vectors.
template <int N>
struct Bytes {
    vi v[N / LANES];
    INLINE explicit Bytes(const uint8_t* p) {
        for (int i = 0; i < N / LANES; i++) v[i] = load_u8(p + i * LANES);
    }
};

struct F32 {
    static constexpr int weights = LANES, bytes = 4 * LANES;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        sink(0, read<vf>(b));
    }
};

struct F16 {
    static constexpr int weights = LANES, bytes = 2 * LANES;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        sink(0, load_half(b));
    }
};

struct BF16 {
    static constexpr int weights = LANES, bytes = 2 * LANES;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        sink(0, bits_to_float(load_u16(b) << 16));
    }
};

// 16 bytes of nibbles: the low halves are weights 0..16, the high halves 16..32.
template <class Sink>
INLINE void decode_nibbles(const uint8_t* qs, vf scale, vf low, Sink sink) {
    const Bytes<16> q(qs);
    const Nibbles value(scale, low);
    for (int i = 0; i < 16; i += LANES) sink(i, value(q.v[i / LANES]));
    for (int i = 0; i < 16; i += LANES) sink(16 + i, value(q.v[i / LANES] >> 4));
}

struct Q4_0 {
    static constexpr int weights = 32, bytes = 18;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const vf d = splat(half(b));
        decode_nibbles(b + 2, d, d * -8.0f, sink);
    }
};

struct Q4_1 {
    static constexpr int weights = 32, bytes = 20;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        decode_nibbles(b + 4, splat(half(b)), splat(half(b + 2)), sink);
    }
};

struct IQ4_NL {
    static constexpr int weights = 32, bytes = 18;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        static const float values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        const vf d = splat(half(b));
        const Bytes<16> q(b + 2);
        for (int i = 0; i < 16; i += LANES) sink(i, lookup16(q.v[i / LANES], values) * d);
        for (int i = 0; i < 16; i += LANES) sink(16 + i, lookup16(q.v[i / LANES] >> 4, values) * d);
    }
};

// Nibbles with a fifth bit each, bit i of `high` belonging to weight i.
template <class Sink>
INLINE void decode_fives(const uint8_t* high, const uint8_t* qs, vf scale, vf low, Sink sink) {
    const Bytes<16> q(qs);
    vi bit;
    for (int i = 0; i < LANES; i++) bit[i] = 1 << i;
    const uint32_t bits = read<uint32_t>(high);
    for (int i = 0; i < 32; i += LANES) {
        const vi nibble = i < 16 ? q.v[i / LANES] & 15 : q.v[(i - 16) / LANES] >> 4;
        const vi fifth = ((vi{} + (int32_t)(bits >> i)) & bit) != 0;  // all ones or zero
        sink(i, fma(to_float(nibble | (fifth & 16)), scale, low));
    }
}

struct Q5_0 {
    static constexpr int weights = 32, bytes = 22;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const vf d = splat(half(b));
        decode_fives(b + 2, b + 6, d, d * -16.0f, sink);
    }
};

struct Q5_1 {
    static constexpr int weights = 32, bytes = 24;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        decode_fives(b + 4, b + 8, splat(half(b)), splat(half(b + 2)), sink);
    }
};

struct Q8_0 {
    static constexpr int weights = 32, bytes = 34;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const vf d = splat(half(b));
        for (int i = 0; i < 32; i += LANES) sink(i, to_float(load_i8(b + 2 + i)) * d);
    }
};

// 16 groups of 16 weights with a 4-bit scale and minimum each. 32 bytes hold 128 weights, two bits a time.
struct Q2_K {
    static constexpr int weights = 256, bytes = 84;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const float d = half(b + 80), dmin = half(b + 82);
        for (int part = 0; part < 2; part++) {
            const Bytes<32> q(b + 16 + 32 * part);
            for (int shift = 0; shift < 8; shift += 2) {
                for (int i = 0; i < 32; i += LANES) {
                    const int at = 128 * part + 16 * shift + i;
                    const uint8_t pair = b[at / 16];
                    const vf scale = splat(d * (float)(pair & 15)), low = splat(-dmin * (float)(pair >> 4));
                    sink(at, fma(to_float(q.v[i / LANES] >> shift & 3), scale, low));
                }
            }
        }
    }
};

// As Q2_K, with a third bit in `hmask` and signed 6-bit scales: 8 bytes of low nibbles, 4 of high pairs.
struct Q3_K {
    static constexpr int weights = 256, bytes = 110;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const float d = half(b + 108);
        const Bytes<32> hmask(b);
        for (int part = 0; part < 2; part++) {
            const Bytes<32> q(b + 32 + 32 * part);
            for (int shift = 0; shift < 8; shift += 2) {
                for (int i = 0; i < 32; i += LANES) {
                    const int at = 128 * part + 16 * shift + i, group = at / 16;
                    const int nibble = b[96 + group % 8] >> (group / 8 * 4) & 15;
                    const int pair = b[104 + group % 4] >> (group / 4 * 2) & 3;
                    const vf scale = splat(d * (float)((nibble | pair << 4) - 32));
                    const vi third = hmask.v[i / LANES] >> (4 * part + shift / 2) & 1;
                    const vi value = (q.v[i / LANES] >> shift & 3) | third << 2;
                    sink(at, fma(to_float(value), scale, scale * -4.0f));
                }
            }
        }
    }
};

// Scales and minima of Q4_K and Q5_K: eight 6-bit pairs in 12 bytes.
struct SixBitPairs {
    float scale[8], low[8];
    INLINE SixBitPairs(const uint8_t* b) {
        const float d = half(b), dmin = half(b + 2);
        const uint32_t a = read<uint32_t>(b + 4), m = read<uint32_t>(b + 8), top = read<uint32_t>(b + 12);
        const uint32_t scales[2] = {a & 0x3f3f3f3f, (top & 0x0f0f0f0f) | (a >> 2 & 0x30303030)};
        const uint32_t lows[2] = {m & 0x3f3f3f3f, (top >> 4 & 0x0f0f0f0f) | (m >> 2 & 0x30303030)};
        for (int i = 0; i < 8; i++) {
            scale[i] = d * (float)(scales[i / 4] >> (i % 4 * 8) & 255);
            low[i] = -dmin * (float)(lows[i / 4] >> (i % 4 * 8) & 255);
        }
    }
};

struct Q4_K {
    static constexpr int weights = 256, bytes = 144;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const SixBitPairs pairs(b);
        for (int part = 0; part < 4; part++) {
            const Bytes<32> q(b + 16 + 32 * part);
            const Nibbles first(splat(pairs.scale[2 * part]), splat(pairs.low[2 * part]));
            for (int i = 0; i < 32; i += LANES) sink(64 * part + i, first(q.v[i / LANES]));
            const Nibbles second(splat(pairs.scale[2 * part + 1]), splat(pairs.low[2 * part + 1]));
            for (int i = 0; i < 32; i += LANES) sink(64 * part + 32 + i, second(q.v[i / LANES] >> 4));
        }
    }
};

struct Q5_K {
    static constexpr int weights = 256, bytes = 176;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const SixBitPairs pairs(b);
        const Bytes<32> high(b + 16);
        for (int group = 0; group < 8; group++) {
            const Bytes<32> q(b + 48 + 32 * (group / 2));
            const vf scale = splat(pairs.scale[group]), low = splat(pairs.low[group]);
            for (int i = 0; i < 32; i += LANES) {
                const vi fifth = (high.v[i / LANES] >> group & 1) << 4;
                const vi nibble = q.v[i / LANES] >> (group % 2 * 4) & 15;
                sink(32 * group + i, fma(to_float(nibble | fifth), scale, low));
            }
        }
    }
};

// 16 groups of 16 with a signed 8-bit scale. 64 bytes of nibbles and 32 of bit pairs hold 128 weights.
struct Q6_K {
    static constexpr int weights = 256, bytes = 210;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, Sink sink) {
        const float d = half(b + 208);
        for (int part = 0; part < 2; part++) {
            const Bytes<32> high(b + 128 + 32 * part);
            for (int quarter = 0; quarter < 4; quarter++) {
                const Bytes<32> q(b + 64 * part + 32 * (quarter % 2));
                for (int i = 0; i < 32; i += LANES) {
                    const int at = 128 * part + 32 * quarter + i;
                    const vf scale = splat(d * (float)(int8_t)b[192 + at / 16]);
                    const vi nibble = q.v[i / LANES] >> (quarter / 2 * 4) & 15;
                    const vi top = (high.v[i / LANES] >> (2 * quarter) & 3) << 4;
                    sink(at, to_float((nibble | top) - 32) * scale);
                }
            }
        }
    }
};

}  // namespace
