// The weight types: how a block of bytes becomes lanes of float weights.
//
// Each type is a struct with `weights` and `bytes` per block and two steps. `prepare` writes the block's
// `scales` floats, which `decode` takes; it runs some blocks ahead (`run` of them), so that scales come
// back as broadcast loads, which cost no arithmetic port. `decode` hands the weights to `sink(at, lanes)`
// in ascending order of `at`, the index of the first lane within the block. The ascending order is a
// contract: with it a dot product that decodes as it goes and one over decoded rows add up alike.
//
// Every weight comes out as in `reference.py`, bit for bit where the machine has fused multiply-add.
// Layouts: ggml's block definitions.
#pragma once
#include "simd.h"

namespace {

typedef uint64_t longs4 __attribute__((vector_size(32)));
typedef uint16_t words16 __attribute__((vector_size(32)));

// Each byte moved by `left` bits, or right if negative, and masked; the mask drops what neighbours leak.
INLINE bytes32 bits(bytes32 v, int left, uint8_t mask) {
    const words16 moved = left < 0 ? (words16)v >> -left : (words16)v << left;
    return (bytes32)moved & mask;
}

// Writes 32 bytes to memory for good: read back as 16 bytes at a time they widen on a load port, where
// taking a register apart would occupy the one port that shuffles.
INLINE void spill(bytes32 v, uint8_t* to) {
    memcpy(to, &v, 32);
    keep_in_memory<uint8_t[32]>(to);
}

// Floats are blocks of one vector; a row may end in a part of one.
struct FloatBlocks {
    static constexpr int weights = LANES, scales = 0, run = 8;
    static INLINE void prepare(const uint8_t*, float*) {}
};

struct F32 : FloatBlocks {
    static constexpr int bytes = 4 * LANES;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float*, Sink sink) {
        sink(0, read<vf>(b));
    }
};

struct F16 : FloatBlocks {
    static constexpr int bytes = 2 * LANES;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float*, Sink sink) {
        sink(0, load_half(b));
    }
};

struct BF16 : FloatBlocks {
    static constexpr int bytes = 2 * LANES;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float*, Sink sink) {
        sink(0, bits_to_float(load_u16(b) << 16));
    }
};

// Blocks of 32 that begin with a half-precision scale and perhaps a second one.
struct SmallBlocks {
    static constexpr int weights = 32, scales = 4, run = 8;
    static INLINE void prepare(const uint8_t* b, float* s) { four_halves(b, s); }
};

// 16 bytes of nibbles: the low halves are weights 0..16, the high halves 16..32.
template <class Sink>
INLINE void decode_nibbles(const uint8_t* qs, const Nibbles& value, Sink sink) {
    vi q[16 / LANES];
    for (int i = 0; i < 16; i += LANES) sink(i, value(q[i / LANES] = load_u8(qs + i)));
    for (int i = 0; i < 16; i += LANES) sink(16 + i, value(q[i / LANES] >> 4));
}

struct Q4_0 : SmallBlocks {
    static constexpr int bytes = 18;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        decode_nibbles(b + 2, Nibbles::centred(s[0]), sink);
    }
};

struct Q4_1 : SmallBlocks {
    static constexpr int bytes = 20;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        decode_nibbles(b + 4, Nibbles(splat(s[0]), splat(s[1])), sink);
    }
};

struct IQ4_NL : SmallBlocks {
    static constexpr int bytes = 18;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        static const float values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                         1,    13,   25,  38,  53,  69,  89,  113};
        const vf d = splat(s[0]);
        vi q[16 / LANES];
        for (int i = 0; i < 16; i += LANES) sink(i, lookup16(q[i / LANES] = load_u8(b + 2 + i), values) * d);
        for (int i = 0; i < 16; i += LANES) sink(16 + i, lookup16(q[i / LANES] >> 4, values) * d);
    }
};

// Nibbles with a fifth bit each, bit i of the four bytes `high` belonging to weight i.
template <class Sink>
INLINE void decode_fives(const uint8_t* high, const uint8_t* qs, vf scale, vf low, Sink sink) {
    const uint64_t a = read<uint64_t>(qs), b = read<uint64_t>(qs + 8);
    bytes32 first_half = {};
    for (int i = 0; i < 16; i++) first_half[i] = 255;
    const bytes32 twice = (bytes32)longs4{a, b, a, b}, fifth = spread_bits(read<uint32_t>(high)) & 16;
    uint8_t q[32];
    spill((bits(twice, 0, 15) & first_half) | (bits(twice, -4, 15) & ~first_half) | fifth, q);
    for (int i = 0; i < 32; i += LANES) sink(i, fma(to_float(load_u8(q + i)), scale, low));
}

struct Q5_0 : SmallBlocks {
    static constexpr int bytes = 22;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        decode_fives(b + 2, b + 6, splat(s[0]), splat(s[0]) * -16.0f, sink);
    }
};

struct Q5_1 : SmallBlocks {
    static constexpr int bytes = 24;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        decode_fives(b + 4, b + 8, splat(s[0]), splat(s[1]), sink);
    }
};

struct Q8_0 : SmallBlocks {
    static constexpr int bytes = 34;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        for (int i = 0; i < 32; i += LANES) sink(i, to_float(load_i8(b + 2 + i)) * splat(s[0]));
    }
};

// Blocks of 256 in groups with scales of their own. Bits are put together 32 weights at a time as bytes.
struct LargeBlocks {
    static constexpr int weights = 256, scales = 32, run = 1;
};

// 16 packed numbers, less `low`, as floats times `scale`.
INLINE void scale16(const uint8_t* packed, float scale, int32_t shift, int32_t mask, int32_t low, float* s) {
    for (int i = 0; i < 16; i += LANES) {
        store(s + i, to_float((load_u8(packed + i) >> shift & mask) - low) * splat(scale));
    }
}

// 16 groups of 16 weights with a 4-bit scale and minimum each; a byte holds two bits of four weights.
struct Q2_K : LargeBlocks {
    static constexpr int bytes = 84;
    static INLINE void prepare(const uint8_t* b, float* s) {
        scale16(b, half(b + 80), 0, 15, 0, s);
        scale16(b, -half(b + 82), 4, 15, 0, s + 16);
    }
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        for (int part = 0; part < 2; part++) {
            const bytes32 two = read<bytes32>(b + 16 + 32 * part);
            for (int j = 0; j < 4; j++) {
                uint8_t q[32];
                spill(bits(two, -2 * j, 3), q);
                for (int i = 0; i < 32; i += LANES) {
                    const int at = 128 * part + 32 * j + i;
                    sink(at, fma(to_float(load_u8(q + i)), splat(s[at / 16]), splat(s[16 + at / 16])));
                }
            }
        }
    }
};

// As Q2_K, with a third bit in the first 32 bytes and signed 6-bit scales: 8 bytes of nibbles, 4 of bit pairs.
struct Q3_K : LargeBlocks {
    static constexpr int bytes = 110;
    static INLINE void prepare(const uint8_t* b, float* s) {
        const uint32_t n0 = read<uint32_t>(b + 96), n1 = read<uint32_t>(b + 100);
        const uint32_t pairs = read<uint32_t>(b + 104);
        const uint32_t nibble = 0x0f0f0f0f, pair = 0x30303030;
        const uint32_t six[4] = {(n0 & nibble) | (pairs << 4 & pair), (n1 & nibble) | (pairs << 2 & pair),
                                 (n0 >> 4 & nibble) | (pairs & pair), (n1 >> 4 & nibble) | (pairs >> 2 & pair)};
        uint8_t packed[16];
        memcpy(packed, six, 16);
        scale16(packed, half(b + 108), 0, 63, 32, s);
    }
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        const bytes32 third = read<bytes32>(b);
        for (int part = 0; part < 2; part++) {
            const bytes32 two = read<bytes32>(b + 32 + 32 * part);
            for (int j = 0; j < 4; j++) {
                uint8_t q[32];
                spill((bits(two, -2 * j, 3) | bits(third, 2 - (4 * part + j), 4)) - 4, q);
                for (int i = 0; i < 32; i += LANES) {
                    const int at = 128 * part + 32 * j + i;
                    sink(at, to_float(load_i8(q + i)) * splat(s[at / 16]));
                }
            }
        }
    }
};

// Eight groups of 32 with a 6-bit scale and minimum each, the pairs in 12 bytes.
struct PairedBlocks : LargeBlocks {
    static INLINE void prepare(const uint8_t* b, float* s) {
        const uint32_t a = read<uint32_t>(b + 4), m = read<uint32_t>(b + 8), top = read<uint32_t>(b + 12);
        const uint32_t nibble = 0x0f0f0f0f, pair = 0x30303030;
        const uint32_t six[4] = {a & 0x3f3f3f3f, (top & nibble) | (a >> 2 & pair),  // scales
                                 m & 0x3f3f3f3f, (top >> 4 & nibble) | (m >> 2 & pair)};
        uint8_t packed[16];
        memcpy(packed, six, 16);
        const float d = half(b), dmin = -half(b + 2);
        for (int i = 0; i < 16; i += LANES) {
            const vf scale = LANES == 16 ? halves(d, dmin) : splat(i < 8 ? d : dmin);
            store(s + i, to_float(load_u8(packed + i)) * scale);
        }
    }
};

struct Q4_K : PairedBlocks {
    static constexpr int bytes = 144;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        for (int part = 0; part < 4; part++) {
            vi q[32 / LANES];
            const Nibbles first(splat(s[2 * part]), splat(s[8 + 2 * part]));
            for (int i = 0; i < 32; i += LANES) {
                sink(64 * part + i, first(q[i / LANES] = load_u8(b + 16 + 32 * part + i)));
            }
            const Nibbles second(splat(s[2 * part + 1]), splat(s[8 + 2 * part + 1]));
            for (int i = 0; i < 32; i += LANES) sink(64 * part + 32 + i, second(q[i / LANES] >> 4));
        }
    }
};

struct Q5_K : PairedBlocks {
    static constexpr int bytes = 176;
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        const bytes32 fifth = read<bytes32>(b + 16);
        for (int group = 0; group < 8; group++) {
            const bytes32 four = read<bytes32>(b + 48 + 32 * (group / 2));
            uint8_t q[32];
            spill(bits(four, group % 2 * -4, 15) | bits(fifth, 4 - group, 16), q);
            for (int i = 0; i < 32; i += LANES) {
                sink(32 * group + i, fma(to_float(load_u8(q + i)), splat(s[group]), splat(s[8 + group])));
            }
        }
    }
};

// 16 groups of 16 with a signed 8-bit scale. 64 bytes of nibbles and 32 of bit pairs hold 128 weights.
struct Q6_K : LargeBlocks {
    static constexpr int bytes = 210;
    static INLINE void prepare(const uint8_t* b, float* s) {
        const vf d = splat(half(b + 208));
        for (int i = 0; i < 16; i += LANES) store(s + i, to_float(load_i8(b + 192 + i)) * d);
    }
    template <class Sink>
    static INLINE void decode(const uint8_t* b, const float* s, Sink sink) {
        for (int part = 0; part < 2; part++) {
            const bytes32 top = read<bytes32>(b + 128 + 32 * part);
            for (int j = 0; j < 4; j++) {
                const bytes32 four = read<bytes32>(b + 64 * part + 32 * (j % 2));
                uint8_t q[32];
                spill((bits(four, j / 2 * -4, 15) | bits(top, 4 - 2 * j, 48)) - 32, q);
                for (int i = 0; i < 32; i += LANES) {
                    const int at = 128 * part + 32 * j + i;
                    sink(at, to_float(load_i8(q + i)) * splat(s[at / 16]));
                }
            }
        }
    }
};

}  // namespace
