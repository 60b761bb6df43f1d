// Inputs as quantised weights meet them: groups of signed bytes with one scale.
//
// q = round(x * 127 / largest |x|), half to even, scale = largest / 127, over 32 columns for the small types and
// 256 for the large: the groups of llama.cpp. A group with an infinite or NaN input has a NaN scale, so that
// whatever meets it becomes NaN. Knows of a weight type W only where its zero is.
#pragma once
#include "rows.h"

namespace {

constexpr float SMALLEST = 1e-30f;  // a group whose largest magnitude is below counts as zeros
constexpr float LARGEST = 0x1.fffffep127f;

struct alignas(64) Input32 {
    int8_t q[32];
    // What the weights' zero point (int32, -OFFSET times the sum of q) or their low (float, the scale times that
    // sum) goes with, for each lane.
    uint8_t term[16];
    float scale;
};

struct alignas(64) Input256 {
    int8_t q[256];
    int16_t sums[16];  // of 16 q each
    float scale;
};

// Writes N bytes, returns their scale.
template <int N>
INLINE float quantise(const float* x, int8_t* q) {
    vi most = {};
    for (int k = 0; k < N; k += LANES) {
        const vi magnitude = read<vi>(x + k) & 0x7fffffff;  // in order even if infinite or NaN
        most = magnitude > most ? magnitude : most;
    }
    const float largest = read_float(greatest(most));
    if (largest < SMALLEST || !(largest <= LARGEST)) {
        memset(q, 0, N);
        return largest < SMALLEST ? 0.0f : __builtin_nanf("");
    }
    const vf inverse = splat(127.0f / largest);
    for (int k = 0; k < N; k += LANES) {
        typedef int8_t narrow __attribute__((vector_size(LANES)));
        const narrow v = __builtin_convertvector(to_int(load(x + k) * inverse), narrow);
        memcpy(q + k, &v, sizeof v);
    }
    return largest / 127.0f;
}

// Sums of four neighbours.
INLINE void sum_fours(const int8_t* q, int32_t* sums) {
    const vi v = dot<false>(vi{}, vb{} + 1, repeat16(q));
    memcpy(sums, &v, 16);
}

template <class W>
INLINE void pack_input(const float* x, Input32& in) {
    in.scale = quantise<32>(x, in.q);
    int32_t first[4], second[4];
    sum_fours(in.q, first);
    sum_fours(in.q + 16, second);
    for (int i = 0; i < 4; i++) {
        const int32_t sum = first[i] + second[i], offset = -W::OFFSET * sum;
        const float low = in.scale * (float)sum;
        memcpy(in.term + 4 * i, W::HAS_LOW ? (const void*)&low : &offset, 4);
    }
}

template <class W>
INLINE void pack_input(const float* x, Input256& in) {
    in.scale = quantise<256>(x, in.q);
    for (int i = 0; i < 16; i++) {
        int32_t fours[4];
        sum_fours(in.q + 16 * i, fours);
        in.sums[i] = (int16_t)(fours[0] + fours[1] + fours[2] + fours[3]);
    }
}

}  // namespace
