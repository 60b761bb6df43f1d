// How cached keys and values are stored: as single numbers, or as bytes that share a scale.
//
// Knows a row: one head of one token. `attention.h` knows where rows lie.
#pragma once
#include <string.h>

#include "simd.h"

namespace {

// load: LANES cells as floats, without their scale. store: LANES floats as cells.
struct CellF32 {
    static constexpr int bytes = 4;
    static constexpr bool scaled = false;
    static INLINE vf load(const uint8_t* p) { return read<vf>(p); }
    static INLINE void store(uint8_t* p, vf v) { memcpy(p, &v, sizeof v); }
};

struct CellF16 {
    static constexpr int bytes = 2;
    static constexpr bool scaled = false;
    static INLINE vf load(const uint8_t* p) { return load_half(p); }
    static INLINE void store(uint8_t* p, vf v) { store_half(p, v); }
};

struct CellBF16 {
    static constexpr int bytes = 2;
    static constexpr bool scaled = false;
    static INLINE vf load(const uint8_t* p) { return bits_to_float(load_u16(p) << 16); }
    static INLINE void store(uint8_t* p, vf v) {  // to the nearest, ties to even
        const vi bits = (vi)v, odd = bits >> 16 & 1, nan = (vi)(v != v);
        store_u16(p, (((bits + 0x7fff + odd) & ~nan) | (nan & 0x7fc00000)) >> 16);
    }
};

struct CellI8 {
    static constexpr int bytes = 1;
    static constexpr bool scaled = true;
    static INLINE vf load(const uint8_t* p) { return to_float(load_i8(p)); }
    static INLINE void store(uint8_t* p, vf v) { store_i8(p, to_int(v)); }
};

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
