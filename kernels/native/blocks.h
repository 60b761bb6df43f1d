// The weight types: what the bytes of a block mean.
//
// A float type is a block of one vector that `decode` widens. A quantised type unpacks GROUP rows at once to
// unsigned numbers q, 16 weights of each row to a vector, and the scales that go with them: a weight is
// (q - OFFSET) * scale, or q * scale + low for types with HAS_LOW. Small types have one scale per block of 32;
// large ones, blocks of 256 with a whole-number scale and low for every 16. Nothing is multiplied here.
//
// Layouts: ggml's block definitions.
#pragma once
#include "rows.h"

namespace {

// Floats are blocks of one vector; a row may end in a part of one.
struct F32 {
    static constexpr int weights = LANES, bytes = 4 * LANES;
    static INLINE vf decode(const uint8_t* b) { return read<vf>(b); }
};

struct F16 {
    static constexpr int weights = LANES, bytes = 2 * LANES;
    static INLINE vf decode(const uint8_t* b) { return load_half(b); }
};

struct BF16 {
    static constexpr int weights = LANES, bytes = 2 * LANES;
    static INLINE vf decode(const uint8_t* b) { return bits_to_float(load_u16(b) << 16); }
};

// Blocks of 32 that begin with a half-precision scale, and for types with HAS_LOW a half-precision low. Only of
// SIGNED types does q take eight bits.
template <int BYTES, int OFFSET_>
struct SmallBlocks {
    static constexpr int weights = 32, bytes = BYTES, OFFSET = OFFSET_;
    static constexpr bool HAS_LOW = OFFSET == 0, SIGNED = false;
};

template <int BYTES>
struct SignedBlocks {
    static constexpr int weights = 32, bytes = BYTES, OFFSET = SIGNED_OFFSET;
    static constexpr bool HAS_LOW = false, SIGNED = true;
};

// 16 bytes of nibbles: the low halves are weights 0..16, the high halves 16..32.
INLINE void unpack_nibbles(const Rows& rows, int64_t at, vb* q) {
    const vb both = load16(rows, at);
    q[0] = both & 15;
    q[1] = bits(both, 4, 15);
}

struct Q4_0 : SmallBlocks<18, 8> {
    static INLINE void unpack(const Rows& rows, vb* q) { unpack_nibbles(rows, 2, q); }
};

struct Q4_1 : SmallBlocks<20, 0> {
    static INLINE void unpack(const Rows& rows, vb* q) { unpack_nibbles(rows, 4, q); }
};

struct IQ4_NL : SignedBlocks<18> {
    static INLINE void unpack(const Rows& rows, vb* q) {
        static const int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        const vb table = from_signed(repeat16(values));
        unpack_nibbles(rows, 2, q);
        for (int i = 0; i < 2; i++) q[i] = shuffle(table, q[i]);
    }
};

// Nibbles with a fifth bit each, bit i of four bytes belonging to weight i.
INLINE void unpack_fives(const Rows& rows, int64_t high_at, int64_t at, vb* q) {
    static const uint8_t byte_of[2][16] = {{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1},
                                           {2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3}};
    static const uint8_t bit_of[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const vb high = load4(rows, high_at);
    unpack_nibbles(rows, at, q);
    for (int i = 0; i < 2; i++) {
        const vb bit = shuffle(high, repeat16(byte_of[i])) & repeat16(bit_of);
        q[i] |= (vb)(bit != 0) & 16;
    }
}

struct Q5_0 : SmallBlocks<22, 16> {
    static INLINE void unpack(const Rows& rows, vb* q) { unpack_fives(rows, 2, 6, q); }
};

struct Q5_1 : SmallBlocks<24, 0> {
    static INLINE void unpack(const Rows& rows, vb* q) { unpack_fives(rows, 4, 8, q); }
};

struct Q8_0 : SignedBlocks<34> {
    static INLINE void unpack(const Rows& rows, vb* q) {
        for (int i = 0; i < 2; i++) q[i] = from_signed(load16(rows, 2 + 16 * i));
    }
};

// Blocks of 256. `scales` gives the whole-number scales and lows of 16 weights each as 2 vectors of 8 words a
// row; for types with HAS_LOW a weight is q * scale * d - low * dmin, for others (q * scale - low) * d with
// low = OFFSET * scale. `unpack` hands q to `sink(i, q)`, weights [16 i, 16 i + 16).
template <int BYTES, int OFFSET_>
struct LargeBlocks {
    static constexpr int weights = 256, bytes = BYTES, OFFSET = OFFSET_;
    static constexpr bool HAS_LOW = OFFSET == 0;
};

INLINE void widen_all(vb scale, vw* out) {
    for (int i = 0; i < 2; i++) out[i] = widen(scale, i);
}

INLINE void offset_lows(int offset, const vw* scale, vw* low) {
    for (int i = 0; i < 2; i++) low[i] = scale[i] * (int16_t)offset;
}

// 4-bit scales and lows; a byte holds two bits of four weights.
struct Q2_K : LargeBlocks<84, 0> {
    static INLINE void scales(const Rows& rows, vw* scale, vw* low, vf& d, vf& dmin) {
        const vb both = load16(rows, 0);
        widen_all(both & 15, scale);
        widen_all(bits(both, 4, 15), low);
        load_halves(rows, 80, d, dmin);
    }
    template <class Sink>
    static INLINE void unpack(const Rows& rows, Sink sink) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const vb two = load16(rows, 16 + 16 * i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sink(8 * (i / 2) + i % 2 + 2 * j, bits(two, 2 * j, 3));
        }
    }
};

// As Q2_K, with a third bit in the first 32 bytes and 6-bit scales less 32: 8 bytes of nibbles, 4 of bit pairs.
struct Q3_K : LargeBlocks<110, 4> {
    static INLINE void scales(const Rows& rows, vw* scale, vw* low, vf& d, vf&) {
        static const uint8_t nibbles[16] = {2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9};
        static const uint8_t pairs[16] = {10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13};
        static const uint32_t nibble_shift[4] = {0, 0, 4, 4}, pair_shift[4] = {0, 2, 4, 6};
        const vb packed = load16(rows, 94);  // from 96 on it would reach beyond the block
        const vi four = (vi)shuffle(packed, repeat16(nibbles)) >> (vi)repeat16(nibble_shift);
        const vi two = (vi)shuffle(packed, repeat16(pairs)) >> (vi)repeat16(pair_shift);
        widen_all((((vb)four & 15) | bits((vb)two & 3, -4, 48)) - 32, scale);
        offset_lows(OFFSET, scale, low);
        vf before;
        load_halves(rows, 106, before, d);
    }
    template <class Sink>
    static INLINE void unpack(const Rows& rows, Sink sink) {
        const vb third[2] = {load16(rows, 0), load16(rows, 16)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const vb two = load16(rows, 32 + 16 * i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vb four = bits(third[i % 2], 4 * (i / 2) + j - 2, 4);
                sink(8 * (i / 2) + i % 2 + 2 * j, bits(two, 2 * j, 3) | four);
            }
        }
    }
};

// 6-bit scales and lows of 32 weights each, eight pairs in 12 bytes.
template <int BYTES>
struct PairedBlocks : LargeBlocks<BYTES, 0> {
    static INLINE void scales(const Rows& rows, vw* scale, vw* low, vf& d, vf& dmin) {
        // Four bytes at a time: scales 0..4, lows 0..4, scales 4..8, lows 4..8.
        static const uint8_t first[16] = {4, 5, 6, 7, 8, 9, 10, 11, 4, 5, 6, 7, 8, 9, 10, 11};
        static const uint8_t last[16] = {12, 13, 14, 15, 12, 13, 14, 15, 12, 13, 14, 15, 12, 13, 14, 15};
        static const uint32_t first_shift[4] = {0, 0, 2, 2}, last_shift[4] = {0, 0, 0, 4};
        static const uint32_t first_mask[4] = {0x3f3f3f3f, 0x3f3f3f3f, 0x30303030, 0x30303030};
        static const uint32_t last_mask[4] = {0, 0, 0x0f0f0f0f, 0x0f0f0f0f};
        static const uint8_t scale_of[16] = {0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11};
        static const uint8_t low_of[16] = {4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15};
        const vb head = load16(rows, 0);
        const vi a = (vi)shuffle(head, repeat16(first)) >> (vi)repeat16(first_shift);
        const vi b = (vi)shuffle(head, repeat16(last)) >> (vi)repeat16(last_shift);
        const vb six = (vb)((a & (vi)repeat16(first_mask)) | (b & (vi)repeat16(last_mask)));
        widen_all(shuffle(six, repeat16(scale_of)), scale);
        widen_all(shuffle(six, repeat16(low_of)), low);
        load_halves(rows, 0, d, dmin);
    }
};

struct Q4_K : PairedBlocks<144> {
    template <class Sink>
    static INLINE void unpack(const Rows& rows, Sink sink) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const vb both = load16(rows, 16 + 16 * i);
            sink(4 * (i / 2) + i % 2, both & 15);
            sink(4 * (i / 2) + i % 2 + 2, bits(both, 4, 15));
        }
    }
};

struct Q5_K : PairedBlocks<176> {
    template <class Sink>
    static INLINE void unpack(const Rows& rows, Sink sink) {
        const vb fifth[2] = {load16(rows, 16), load16(rows, 32)};
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const vb both = load16(rows, 48 + 16 * i);
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const vb sixteen = bits(fifth[i % 2], i / 2 * 2 + j - 4, 16);
                sink(4 * (i / 2) + i % 2 + 2 * j, bits(both, 4 * j, 15) | sixteen);
            }
        }
    }
};

// Signed 8-bit scales. 64 bytes of nibbles and 32 of bit pairs hold 128 weights.
struct Q6_K : LargeBlocks<210, 32> {
    static INLINE void scales(const Rows& rows, vw* scale, vw* low, vf& d, vf&) {
        widen_all(load16(rows, 192), scale);
        offset_lows(OFFSET, scale, low);
        vf before;
        load_halves(rows, 206, before, d);
    }
    template <class Sink>
    static INLINE void unpack(const Rows& rows, Sink sink) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const vb top = load16(rows, 128 + 16 * i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vb four = load16(rows, 64 * (i / 2) + 32 * (j % 2) + 16 * (i % 2));
                sink(8 * (i / 2) + i % 2 + 2 * j, bits(four, j / 2 * 4, 15) | bits(top, 2 * j - 4, 48));
            }
        }
    }
};

}  // namespace
