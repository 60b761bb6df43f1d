// Norms and activations: what is computed number by number, or row by row, in float32.
#pragma once
#include "home.h"
#include "product.h"
#include "simd.h"
#include "strands.h"

namespace {

// y = x / rms(x) * weight; all have `cols` numbers. The same bits on every machine.
INLINE void normalise(const float* x, const float* weight, float eps, int64_t cols, float* y) {
    const int64_t whole = cols / LANES * LANES;
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, cols) / (float)cols + eps);
    for (int64_t k = 0; k < whole; k += LANES) store(y + k, load(x + k) * splat(scale) * load(weight + k));
    for (int64_t k = whole; k < cols; k++) y[k] = x[k] * scale * weight[k];
}

struct Norm {
    const float *x, *weight;
    float eps;
    int64_t cols;
    float* y;
};

void norm_job(const void* context, int64_t index, int) {
    const Norm& n = *static_cast<const Norm*>(context);
    normalise(n.x + index * n.cols, n.weight, n.eps, n.cols, n.y + index * n.cols);
}

shoal::Status rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t cols, float* y) {
    const Norm n{x, weight, eps, cols, y};
    shoal::Turn().run(rows, rows * cols, norm_job, &n);
    return shoal::OK;
}

INLINE vf silu(vf g) { return g / (exp(-g) + splat(1.0f)); }

// 0.5 g (1 + tanh u) is g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3).
INLINE vf gelu(vf g) {
    const vf u2 = splat(1.5957691216f) * g * fma(splat(0.044715f) * g, g, splat(1.0f));
    return g / (exp(-u2) + splat(1.0f));
}

}  // namespace
