// How cached keys and values are stored: as single numbers, or as bytes that share a scale.
//
// Knows a row: one head of one token. `attention.h` knows where rows lie.
#pragma once
#include <string.h>

#include "simd.h"

namespace {

// load: LANES cells as floats, without their scale. store: LANES floats as cells. load2: 2 * LANES cells as two vectors,
// in an order of which `order` makes that of the cells, unless it is.
template <class Cell>
struct InTurn {
    static constexpr bool in_order = true;
    static INLINE void load2(const uint8_t* p, vf& first, vf& second) {
        first = Cell::load(p);
        second = Cell::load(p + LANES * Cell::bytes);
    }
    static INLINE void order(vf&, vf&) {}
};

struct CellF32 : InTurn<CellF32> {
    static constexpr int bytes = 4;
    static constexpr bool scaled = false;
    static INLINE vf load(const uint8_t* p) { return read<vf>(p); }
    static INLINE void store(uint8_t* p, vf v) { memcpy(p, &v, sizeof v); }
};

struct CellF16 : InTurn<CellF16> {
    static constexpr int bytes = 2;
    static constexpr bool scaled = false;
    static INLINE vf load(const uint8_t* p) { return load_half(p); }
    static INLINE void store(uint8_t* p, vf v) { store_half(p, v); }
};

#if defined(__AVX2__) || defined(__ARM_NEON)
// The even cells, then the odd ones: a shift and a mask, half the operations of widening.
struct EvenThenOdd {
    static constexpr bool in_order = false;
    static INLINE void load2(const uint8_t* p, vf& even, vf& odd) {
        const vi both = read<vi>(p);
        even = bits_to_float(both << 16);
        odd = bits_to_float(both & (int32_t)0xffff0000);
    }
    static INLINE void order(vf& a, vf& b) {
#if defined(__AVX512F__)
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        const __m512 even = (__m512)a, odd = (__m512)b;
        a = (vf)_mm512_permutex2var_ps(even, low, odd);
        b = (vf)_mm512_permutex2var_ps(even, high, odd);
#elif defined(__AVX2__)
        const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
        a = (vf)_mm256_permute2f128_ps(low, high, 0x20);
        b = (vf)_mm256_permute2f128_ps(low, high, 0x31);
#else
        const float32x4_t even = (float32x4_t)a, odd = (float32x4_t)b;
        a = (vf)vzip1q_f32(even, odd);
        b = (vf)vzip2q_f32(even, odd);
#endif
    }
};
using LoadsBF16 = EvenThenOdd;
#else
struct CellBF16;
using LoadsBF16 = InTurn<CellBF16>;
#endif

struct CellBF16 : LoadsBF16 {
    static constexpr int bytes = 2;
    static constexpr bool scaled = false;
    static INLINE vf load(const uint8_t* p) { return bits_to_float(load_u16(p) << 16); }
    static INLINE void store(uint8_t* p, vf v) {  // to the nearest, ties to even
        const vi bits = (vi)v, odd = bits >> 16 & 1, nan = (vi)(v != v);
        store_u16(p, (((bits + 0x7fff + odd) & ~nan) | (nan & 0x7fc00000)) >> 16);
    }
};

struct CellI8 : InTurn<CellI8> {
    static constexpr int bytes = 1;
    static constexpr bool scaled = true;
    static INLINE vf load(const uint8_t* p) { return to_float(load_i8(p)); }
    static INLINE void store(uint8_t* p, vf v) { store_i8(p, to_int(v)); }
};

// V vectors of consecutive cells, as `load2` leaves them. `ordered` puts sums of such vectors into the order of the
// cells.
template <class Cell, int V>
INLINE void load_cells(const uint8_t* p, vf* cells) {
    static_assert(V == 1 || V % 2 == 0);
    if constexpr (V == 1) cells[0] = Cell::load(p);
    for (int v = 0; v + 1 < V; v += 2) Cell::load2(p + v * LANES * Cell::bytes, cells[v], cells[v + 1]);
}
template <class Cell, int V>
INLINE void ordered(vf* sums) {
    for (int v = 0; v + 1 < V; v += 2) Cell::order(sums[v], sums[v + 1]);
}

constexpr float SMALLEST_CELL = 1e-30f;  // a row is stored as zeros if none of its numbers reaches this

// Stores x as `count` cells, whole vectors, and returns their scale: NaN if any x is NaN or infinite, so that this
// shows.
template <class Cell>
INLINE float encode(const float* x, int64_t count, uint8_t* cells) {
    float scale = 1.0f, inverse = 1.0f;
    if (Cell::scaled) {
        vf magnitudes = {}, poison = {};
        for (int64_t d = 0; d < count; d += LANES) {
            const vf v = load(x + d);
            magnitudes = max(magnitudes, max(v, -v));
            poison = poison + v * splat(0.0f);
        }
        const float most = greatest(magnitudes), nothing = sum4(poison, vf{}, vf{}, vf{})[0];
        const bool zeros = !(most >= SMALLEST_CELL);
        scale = (zeros ? 0.0f : most / 127.0f) + nothing;
        inverse = zeros ? 0.0f : 127.0f / most;
    }
    for (int64_t d = 0; d < count; d += LANES) {
        const vf v = load(x + d);
        Cell::store(cells + d * Cell::bytes, Cell::scaled ? v * splat(inverse) : v);
    }
    return scale;
}

}  // namespace
