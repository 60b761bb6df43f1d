// The inputs of quantised weights: groups of 32 columns as whole numbers of 16 or 8 bits with one scale.
//
// q = round(x * MOST / largest |x|), half to even, scale = largest / MOST: the same for every weight type. A group with
// an infinite or NaN input has a NaN scale, so that all its products become NaN.
#pragma once
#include "operands.h"

namespace {

constexpr float SMALLEST = 1e-30f;  // a group whose largest magnitude is less counts as zeros
constexpr float LARGEST = 0x1.fffffep127f;
constexpr int GROUP = 32;  // columns

template <class Scheme>
struct Input : Scheme::Besides {
    char q[8][Scheme::QUAD];  // of four columns each, arranged by the scheme (`operands.h`)
    float scale;
    float low;        // scale times the sum of all q: a low of 32 weights is multiplied by it
    int32_t sums[2];  // of 16 q each

    // Of a half, or of all if `part` is 2.
    INLINE int32_t sum(int part) const { return part == 2 ? sums[0] + sums[1] : sums[part]; }
    INLINE Known known(int part) const {
        if constexpr (Scheme::Besides::FOUND) return {sum(part), this->own[part]};
        else return {sum(part), 0};
    }
};

template <class Bits, class Scheme>
INLINE void pack_group(const float* x, Input<Scheme>& in) {
    vi most = {};
    for (int k = 0; k < GROUP; k += LANES) {
        const vi magnitude = read<vi>(x + k) & 0x7fffffff;  // sorts as numbers do, even if infinite or NaN
        most = magnitude > most ? magnitude : most;
    }
    const float largest = read_float(greatest(most));
    if (largest < SMALLEST || !(largest <= LARGEST)) {
        memset(static_cast<void*>(&in), 0, sizeof in);
        if (!(largest < SMALLEST)) in.scale = in.low = __builtin_nanf("");
        return;
    }
    const vf inverse = splat(Bits::MOST / largest);
    vi sums[2] = {};
    for (int k = 0; k < GROUP; k += LANES) {
        const vi q = to_int(load(x + k) * inverse);
        sums[k / 16] += q;
        Scheme::arrange(q, in.q[k / 4]);
    }
    in.sums[0] = sum_of(sums[0]);
    in.sums[1] = sum_of(sums[1]);
    in.scale = largest / Bits::MOST;
    in.low = in.scale * (float)(in.sums[0] + in.sums[1]);
    if constexpr (Scheme::Besides::FOUND) in.find(in.q);
}

}  // namespace
