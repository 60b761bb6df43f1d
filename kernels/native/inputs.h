// The inputs of quantised weights: groups of 32 columns as whole numbers of 16 bits with one scale.
//
// q = round(x * MOST / largest |x|), half to even, scale = largest / MOST: the same for every weight type. A group with
// an infinite or NaN input has a NaN scale, so that all its products become NaN.
#pragma once
#include "operands.h"

namespace {

constexpr float MOST = 32639;        // 256 * 127 + 127: both halves of a number fit signed bytes
constexpr float SMALLEST = 1e-30f;   // a group whose largest magnitude is less counts as zeros
constexpr float LARGEST = 0x1.fffffep127f;
constexpr int GROUP = 32;            // columns

struct Input {
    char q[8][8];     // of four columns each, arranged by a scheme (`operands.h`)
    float scale;
    float low;        // scale times the sum of all q: a low of 32 weights is multiplied by it
    int32_t sums[2];  // of 16 q each
#if defined(SHOAL_CROSSED)
    int32_t own[3];  // of 16 q each and of all, if they are arranged as words: what `Crossed` takes away, negative
#endif
};

template <class Scheme>
INLINE void pack_group(const float* x, Input& in) {
    vi most = {};
    for (int k = 0; k < GROUP; k += LANES) {
        const vi magnitude = read<vi>(x + k) & 0x7fffffff;  // sorts as numbers do, even if infinite or NaN
        most = magnitude > most ? magnitude : most;
    }
    const float largest = read_float(greatest(most));
    if (largest < SMALLEST || !(largest <= LARGEST)) {
        memset(&in, 0, sizeof in);
        if (!(largest < SMALLEST)) in.scale = in.low = __builtin_nanf("");
        return;
    }
    const vf inverse = splat(MOST / largest);
    vi sums[2] = {};
    for (int k = 0; k < GROUP; k += LANES) {
        const vi q = to_int(load(x + k) * inverse);
        sums[k / 16] += q;
        Scheme::arrange(q, in.q[k / 4]);
    }
    in.sums[0] = sum_of(sums[0]);
    in.sums[1] = sum_of(sums[1]);
    in.scale = largest / MOST;
    in.low = in.scale * (float)(in.sums[0] + in.sums[1]);
#if defined(SHOAL_CROSSED)
    if (!std::is_same_v<Scheme, Words>) return;
    const uint32_t own[2] = {Crossed::own(in.q), Crossed::own(in.q + 4)};
    for (int i = 0; i < 2; i++) in.own[i] = (int32_t)(0 - own[i]);
    in.own[2] = (int32_t)(0 - own[0] - own[1]);
#endif
}

}  // namespace
