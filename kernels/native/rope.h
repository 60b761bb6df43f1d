// Rotary position embedding of one head of one token.
//
// Knows pairs and angles; the caller knows where the angles come from. Source: RoFormer, arXiv 2104.09864.
#pragma once
#include "home.h"
#include "simd.h"

namespace {

// Rotates the first `r.dims` numbers of x by the angles of row `token` of the step.
INLINE void rotate(const shoal::Rotation& r, int64_t token, float* x) {
    const int64_t half = r.dims / 2;
    const float *cos = r.cos + token * half, *sin = r.sin + token * half;
    if (r.interleaved) {
        for (int64_t i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

}  // namespace
