// The weight types: what the bytes of a block mean.
//
// A block of a float type is one vector, which `decode` widens; the rows lie one after the other. A quantised type
// comes in bands, of which LANES rows are unpacked at once. Nothing is multiplied here.
//
// Layouts: ggml's block definitions.
#pragma once
#include "bands.h"

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

// Blocks of a band: `unpack` calls `sink(i, q)` with the bytes of columns [4 i, 4 i + 4). `scales` calls `sink(run,
// scale, low)` for each of the RUNS runs of as many columns. A weight is (q - OFFSET) * scale, or q * scale + low for
// types with HAS_LOW; no q is greater than TOP.
template <int WEIGHTS, int RUNS_, int BYTES, int OFFSET_, int TOP_>
struct Blocks {
    static constexpr int weights = WEIGHTS, RUNS = RUNS_, bytes = BYTES, OFFSET = OFFSET_, TOP = TOP_;
    static constexpr int QUADS = WEIGHTS / RUNS / 4;  // of a run
    static constexpr bool HAS_LOW = OFFSET == 0;
};

// Blocks of 32 begin with a half-precision scale; in types with HAS_LOW a half-precision low follows.
template <int BYTES, int OFFSET, int TOP>
struct SmallBlocks : Blocks<32, 1, BYTES, OFFSET, TOP> {
    template <class Sink>
    static INLINE void scales(const Lines& in, Sink sink) {
        sink(0, in.halves(0), OFFSET ? vf{} : in.halves(2));
    }
};

// 16 bytes of nibbles: the low halves are columns 0..16, the high halves 16..32.
template <class Sink>
INLINE void unpack_nibbles(const Lines& in, int at, Sink sink) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vb both = in.line(at + 4 * i);
        sink(i, both & 15);
        sink(4 + i, bits(both, 4, 15));
    }
}

struct Q4_0 : SmallBlocks<18, 8, 15> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
        unpack_nibbles(in, 2, sink);
    }
};

struct Q4_1 : SmallBlocks<20, 0, 15> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
        unpack_nibbles(in, 4, sink);
    }
};

// Nibbles index a table of signed values.
struct IQ4_NL : SmallBlocks<18, 128, 241> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
        static const uint8_t values[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                           129, 141, 153, 166, 181, 197, 217, 241};  // plus OFFSET
        const vb table = repeat16(values);
        unpack_nibbles(in, 2, [&](int i, vb q) INLINE_LAMBDA { sink(i, shuffle(table, q)); });
    }
};

// Nibbles with a fifth bit each, bit i of four bytes belonging to column i.
template <class Sink>
INLINE void unpack_fives(const Lines& in, int high_at, int at, Sink sink) {
    static const uint8_t spread[4][16] = {{0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12},
                                          {1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13},
                                          {2, 2, 2, 2, 6, 6, 6, 6, 10, 10, 10, 10, 14, 14, 14, 14},
                                          {3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 11, 11, 15, 15, 15, 15}};
    const vb high = in.line(high_at), bit[2] = {(vb)(vi{} + 0x08040201), (vb)(vi{} + (int)0x80402010)};
    unpack_nibbles(in, at, [&](int i, vb q) INLINE_LAMBDA {
        const vb fifth = shuffle(high, repeat16(spread[i / 2])) & bit[i % 2];
        sink(i, q | ((vb)(fifth != 0) & 16));
    });
}

struct Q5_0 : SmallBlocks<22, 16, 31> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
        unpack_fives(in, 2, 6, sink);
    }
};

struct Q5_1 : SmallBlocks<24, 0, 31> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
        unpack_fives(in, 4, 8, sink);
    }
};

struct Q8_0 : SmallBlocks<34, 128, 255> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sink(i, in.line(2 + 4 * i) ^ 128);
    }
};

// 16 bytes of 4-bit scales and lows; a byte holds two bits of four columns.
struct Q2_K : Blocks<256, 16, 84, 0, 3> {
    template <class Sink>
    static INLINE void scales(const Lines& in, Sink sink) {
        const vf d = in.halves(80), dmin = -in.halves(82);
UNROLL_BLOCK
        for (int i = 0; i < 4; i++) {
            const vb both = in.line(4 * i), scale = both & 15, low = bits(both, 4, 15);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                sink(4 * i + j, d * to_float(byte_of(scale, j)), dmin * to_float(byte_of(low, j)));
            }
        }
    }
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
UNROLL_BLOCK
        for (int i = 0; i < 16; i++) {
            const vb two = in.line(16 + 4 * i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sink(32 * (i / 8) + 8 * j + i % 8, bits(two, 2 * j, 3));
        }
    }
};

// As Q2_K, with a third bit in the first 32 bytes and 6-bit scales less 32: 8 bytes of nibbles, 4 of bit pairs.
struct Q3_K : Blocks<256, 16, 110, 4, 7> {
    template <class Sink>
    static INLINE void scales(const Lines& in, Sink sink) {
        const vb nibbles[2] = {in.line(96), in.line(100)}, pairs = in.line(104);
        const vf d = in.halves(108);
UNROLL_BLOCK
        for (int i = 0; i < 4; i++) {
            const vb six = bits(nibbles[i % 2], i / 2 * 4, 15) | bits(pairs, 2 * i - 4, 48);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sink(4 * i + j, d * to_float(byte_of(six, j) - 32), vf{});
        }
    }
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
UNROLL_BLOCK
        for (int i = 0; i < 8; i++) {
            const vb third = in.line(4 * i);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const vb two = in.line(32 + 32 * half + 4 * i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    sink(32 * half + 8 * j + i, bits(two, 2 * j, 3) | bits(third, 4 * half + j - 2, 4));
                }
            }
        }
    }
};

// 6-bit scales and lows of 32 columns each, eight pairs in 12 bytes: four scales, four lows, and four bytes whose low
// and high nibbles are four more of each. The top bits of these are in the first eight bytes.
template <int BYTES, int TOP>
struct PairedBlocks : Blocks<256, 8, BYTES, 0, TOP> {
    template <class Sink>
    static INLINE void scales(const Lines& in, Sink sink) {
        const vb first[2] = {in.line(4), in.line(8)}, nibbles = in.line(12);
        const vf d = in.halves(0), dmin = -in.halves(2);
UNROLL_BLOCK
        for (int i = 0; i < 2; i++) {
            const vb scale = i ? (nibbles & 15) | bits(first[0], 2, 48) : first[0] & 63;
            const vb low = i ? bits(nibbles, 4, 15) | bits(first[1], 2, 48) : first[1] & 63;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                sink(4 * i + j, d * to_float(byte_of(scale, j)), dmin * to_float(byte_of(low, j)));
            }
        }
    }
};

struct Q4_K : PairedBlocks<144, 15> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
UNROLL_BLOCK
        for (int i = 0; i < 32; i++) {
            const vb both = in.line(16 + 4 * i);
            sink(i / 8 * 16 + i % 8, both & 15);
            sink(i / 8 * 16 + i % 8 + 8, bits(both, 4, 15));
        }
    }
};

struct Q5_K : PairedBlocks<176, 31> {
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
UNROLL_BLOCK
        for (int i = 0; i < 8; i++) {
            const vb fifth = in.line(16 + 4 * i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vb both = in.line(48 + 32 * j + 4 * i);
                sink(16 * j + i, (both & 15) | bits(fifth, 2 * j - 4, 16));
                sink(16 * j + i + 8, bits(both, 4, 15) | bits(fifth, 2 * j - 3, 16));
            }
        }
    }
};

// Signed 8-bit scales. 64 bytes of nibbles and 32 of bit pairs hold 128 columns.
struct Q6_K : Blocks<256, 16, 210, 32, 63> {
    template <class Sink>
    static INLINE void scales(const Lines& in, Sink sink) {
        const vf d = in.halves(208);
UNROLL_BLOCK
        for (int i = 0; i < 4; i++) {
            const vb scale = in.line(192 + 4 * i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sink(4 * i + j, d * to_float(signed_byte_of(scale, j)), vf{});
        }
    }
    template <class Sink>
    static INLINE void unpack(const Lines& in, Sink sink) {
UNROLL_BLOCK
        for (int i = 0; i < 16; i++) {
            const int half = i / 8, first = 32 * half + i % 8;
            const vb top = in.line(128 + 4 * i);
            const vb four[2] = {in.line(64 * half + i % 8 * 4), in.line(64 * half + 32 + i % 8 * 4)};
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                sink(first + 8 * j, bits(four[j % 2], j / 2 * 4, 15) | bits(top, 2 * j - 4, 48));
            }
        }
    }
};

}  // namespace
