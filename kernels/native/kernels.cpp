// The kernels, compiled once for each kind of machine (SHOAL_HOME names it).
//
// The contract that shapes everything here: an element of a result is computed by the same sequence of
// float operations whatever is computed beside it. A dot product is `LANES` running sums over ascending
// columns, folded by `sum4`; decoding as it goes (one token) and multiplying decoded tiles (several)
// do exactly that, so batching, threads and tiling change no bit.
#include "blocks.h"
#include "home.h"

namespace {

using shoal::Status;
using shoal::Weights;

constexpr int ROWS = 4;  // rows that share each load of x

template <class T>
INLINE T least(T a, T b) {
    return a < b ? a : b;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is left of a row after its whole blocks (of float types only): a copy filled up with zeros.
template <class W>
struct Tail {
    int64_t at, count;  // columns before it, columns in it
    alignas(64) uint8_t bytes[W::weights == LANES ? W::bytes : 1] = {};
    INLINE Tail(const uint8_t* row, int64_t cols) : at(cols / W::weights * W::weights), count(cols - at) {
        if (count) memcpy(bytes, row + at / W::weights * W::bytes, (size_t)(count * W::bytes / W::weights));
    }
};

// Sums over all columns for R rows and one token; sums[r] are lanes still to be folded.
template <class W, int R>
INLINE void dot(const uint8_t* w, int64_t row_bytes, const float* x, int64_t cols, vf* sums) {
    vf acc[R] = {};
    const int64_t blocks = cols / W::weights;
    for (int64_t b = 0; b < blocks; b++, w += W::bytes, x += W::weights) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + (r + ROWS) * row_bytes);
            W::decode(w + r * row_bytes, [&](int at, vf v) INLINE_LAMBDA { acc[r] = fma(v, load(x + at), acc[r]); });
        }
    }
    if (W::weights == LANES && cols % LANES) {
        float part[LANES] = {};
        memcpy(part, x, (size_t)(cols % LANES) * sizeof(float));
        for (int r = 0; r < R; r++) {
            const Tail<W> tail(w + r * row_bytes - blocks * W::bytes, cols);
            W::decode(tail.bytes, [&](int, vf v) INLINE_LAMBDA { acc[r] = fma(v, load(part), acc[r]); });
        }
    }
    for (int r = 0; r < R; r++) sums[r] = acc[r];
}

// One token: y[0..rows] of consecutive rows.
template <class W>
void dot_rows(const uint8_t* w, int64_t row_bytes, int64_t rows, const float* x, int64_t cols, float* y) {
    for (; rows >= ROWS; rows -= ROWS, w += ROWS * row_bytes, y += ROWS) {
        vf s[ROWS];
        dot<W, ROWS>(w, row_bytes, x, cols, s);
        const vf4 sums = sum4(s[0], s[1], s[2], s[3]);
        memcpy(y, &sums, sizeof sums);
    }
    for (; rows > 0; rows--, w += row_bytes, y++) {
        vf s;
        dot<W, 1>(w, row_bytes, x, cols, &s);
        *y = sum4(s, vf{}, vf{}, vf{})[0];
    }
}

template <class W>
void decode_row(const uint8_t* w, int64_t cols, float* out) {
    const int64_t blocks = cols / W::weights;
    for (int64_t b = 0; b < blocks; b++) {
        W::decode(w + b * W::bytes, [&](int at, vf v) INLINE_LAMBDA { store(out + b * W::weights + at, v); });
    }
    if (W::weights == LANES && cols % LANES) {
        const Tail<W> tail(w, cols);
        W::decode(tail.bytes, [&](int, vf v) INLINE_LAMBDA { memcpy(out + tail.at, &v, (size_t)tail.count * sizeof(float)); });
    }
}

struct Type {
    void (*dot_rows)(const uint8_t*, int64_t, int64_t, const float*, int64_t, float*);
    void (*decode_row)(const uint8_t*, int64_t, float*);
};

template <class W>
constexpr Type type_of() {
    return {dot_rows<W>, decode_row<W>};
}

// By GGUF type id.
const Type* find_type(int32_t id) {
    static constexpr Type types[] = {
        type_of<F32>(),  type_of<F16>(),  type_of<Q4_0>(), type_of<Q4_1>(), {},
        {},              type_of<Q5_0>(), type_of<Q5_1>(), type_of<Q8_0>(), {},
        type_of<Q2_K>(), type_of<Q3_K>(), type_of<Q4_K>(), type_of<Q5_K>(), type_of<Q6_K>(),
        {},              {},              {},              {},              {},
        type_of<IQ4_NL>(),
    };
    static constexpr Type bf16 = type_of<BF16>();
    if (id == 30) return &bf16;
    if (id < 0 || id >= (int32_t)(sizeof types / sizeof types[0]) || !types[id].dot_rows) return nullptr;
    return &types[id];
}

// y (tokens T, rows) of decoded rows: four rows of w, `stride` floats apart, for T tokens.
template <int T>
void multiply(const float* w, int64_t stride, const float* x, int64_t cols, vf4* sums) {
    vf acc[T][ROWS] = {};
    const int64_t whole = cols / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        vf v[ROWS];
        for (int r = 0; r < ROWS; r++) v[r] = load(w + r * stride + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const vf in = load(x + t * cols + k);
            for (int r = 0; r < ROWS; r++) acc[t][r] = fma(v[r], in, acc[t][r]);
        }
    }
    if (whole < cols) {
        for (int t = 0; t < T; t++) {
            float part[LANES] = {};
            memcpy(part, x + t * cols + whole, (size_t)(cols - whole) * sizeof(float));
            for (int r = 0; r < ROWS; r++) acc[t][r] = fma(load(w + r * stride + whole), load(part), acc[t][r]);
        }
    }
    for (int t = 0; t < T; t++) sums[t] = sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, vf4*);

Multiply multiply_of(int64_t tokens) {
    static constexpr Multiply all[] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};
    return all[tokens - 1];
}

INLINE const uint8_t* row_of(const Weights& w, int64_t row) {
    return static_cast<const uint8_t*>(w.data) + row * w.row_bytes;
}

struct Linear {
    const Weights& w;
    const Type& type;
    const float* x;
    const float* bias;
    float* y;
    int64_t tokens;
    int64_t job_rows, row_jobs, job_tokens;  // a job is a tile of rows × tokens
    int64_t stride;                          // floats between decoded rows
};

void dot_job(const void* context, int64_t index, void*) {
    const Linear& l = *static_cast<const Linear*>(context);
    const int64_t start = index * l.job_rows, rows = least(l.job_rows, l.w.rows - start);
    l.type.dot_rows(row_of(l.w, start), l.w.row_bytes, rows, l.x, l.w.cols, l.y + start);
    if (l.bias) {
        for (int64_t r = start; r < start + rows; r++) l.y[r] += l.bias[r];
    }
}

// Decodes a tile of rows once and multiplies it with a tile of tokens.
void tile_job(const void* context, int64_t index, void* scratch) {
    const Linear& l = *static_cast<const Linear*>(context);
    const int64_t cols = l.w.cols, row0 = index % l.row_jobs * l.job_rows, token0 = index / l.row_jobs * l.job_tokens;
    const int64_t rows = least(l.job_rows, l.w.rows - row0), tokens = least(l.job_tokens, l.tokens - token0);
    float* tile = static_cast<float*>(scratch);
    for (int64_t r = 0; r < ceil_div(rows, ROWS) * ROWS; r++) {
        float* out = tile + r * l.stride;
        const int64_t filled = r < rows ? cols : 0;
        if (filled) l.type.decode_row(row_of(l.w, row0 + r), cols, out);
        memset(out + filled, 0, (size_t)(l.stride - filled) * sizeof(float));
    }
    const int64_t groups = ceil_div(tokens, TOKENS);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t from = token0 + tokens * g / groups, until = token0 + tokens * (g + 1) / groups;
        const Multiply multiply_tile = multiply_of(until - from);
        for (int64_t r = 0; r < rows; r += ROWS) {
            vf4 sums[TOKENS];
            multiply_tile(tile + r * l.stride, l.stride, l.x + from * cols, cols, sums);
            const int64_t n = least<int64_t>(ROWS, rows - r);
            for (int64_t t = from; t < until; t++) {
                float* y = l.y + t * l.w.rows + row0 + r;
                for (int64_t i = 0; i < n; i++) y[i] = l.bias ? sums[t - from][i] + l.bias[row0 + r + i] : sums[t - from][i];
            }
        }
    }
}

constexpr int64_t DOT_JOB_BYTES = 32 << 10;    // of weights: some microseconds, so that threads end together
constexpr int64_t TILE_BYTES = 128 << 10;      // of decoded rows: stays in the second-level cache
constexpr int64_t TILE_TOKENS = 192;           // decoding a row costs about as much as multiplying 5 tokens

Status linear(const Weights& w, const float* x, int64_t tokens, const float* bias, float* y) {
    const Type* type = find_type(w.type);
    if (!type) return shoal::BAD_TYPE;
    if (w.rows == 0 || tokens == 0) return shoal::OK;
    Linear l{w, *type, x, bias, y, tokens, 0, 0, 0, 0};
    const int64_t work = w.rows * w.cols * tokens;
    const int64_t share = ceil_div(w.rows, 4 * ROWS * shoal::threads()) * ROWS;  // four jobs for each thread
    if (tokens == 1) {
        l.job_rows = least(share, ceil_div(DOT_JOB_BYTES, ROWS * w.row_bytes) * ROWS);
        return shoal::parallel(ceil_div(w.rows, l.job_rows), work, dot_job, &l, 0);
    }
    l.stride = ceil_div(w.cols, LANES) * LANES + LANES;
    const int64_t fit = ceil_div(TILE_BYTES, ROWS * l.stride * (int64_t)sizeof(float)) * ROWS;
    l.job_rows = least(share, least<int64_t>(fit, 64));
    l.row_jobs = ceil_div(w.rows, l.job_rows);
    l.job_tokens = ceil_div(tokens, ceil_div(tokens, TILE_TOKENS));
    const int64_t jobs = l.row_jobs * ceil_div(tokens, l.job_tokens);
    return shoal::parallel(jobs, work, tile_job, &l, (size_t)(l.job_rows * l.stride) * sizeof(float));
}

struct Gather {
    const Weights& w;
    const Type& type;
    const int64_t* ids;
    float* out;
};

void gather_job(const void* context, int64_t index, void*) {
    const Gather& g = *static_cast<const Gather*>(context);
    const int64_t row = g.ids ? g.ids[index] : index;
    g.type.decode_row(row_of(g.w, row), g.w.cols, g.out + index * g.w.cols);
}

Status gather_rows(const Weights& w, const int64_t* ids, int64_t count, float* out) {
    const Type* type = find_type(w.type);
    if (!type) return shoal::BAD_TYPE;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = ids ? ids[i] : i;
        if (row < 0 || row >= w.rows) return shoal::NO_ROW;
    }
    const Gather g{w, *type, ids, out};
    return shoal::parallel(count, count * w.cols, gather_job, &g, 0);
}

struct Norm {
    const float *x, *weight;
    float eps;
    int64_t cols;
    float* y;
};

void norm_job(const void* context, int64_t index, void*) {
    const Norm& n = *static_cast<const Norm*>(context);
    const float* x = n.x + index * n.cols;
    float* y = n.y + index * n.cols;
    const int64_t whole = n.cols / LANES * LANES;
    vf squares[2] = {};
    for (int64_t k = 0; k < whole; k += LANES) {
        const vf v = load(x + k);
        squares[k / LANES % 2] = fma(v, v, squares[k / LANES % 2]);
    }
    const vf4 sums = sum4(squares[0], squares[1], vf{}, vf{});
    float square = sums[0] + sums[1];
    for (int64_t k = whole; k < n.cols; k++) square += x[k] * x[k];
    const float scale = 1.0f / __builtin_sqrtf(square / (float)n.cols + n.eps);
    for (int64_t k = 0; k < whole; k += LANES) store(y + k, load(x + k) * splat(scale) * load(n.weight + k));
    for (int64_t k = whole; k < n.cols; k++) y[k] = x[k] * scale * n.weight[k];
}

Status rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t cols, float* y) {
    const Norm n{x, weight, eps, cols, y};
    return shoal::parallel(rows, rows * cols, norm_job, &n, 0);
}

// e^x within 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf).
INLINE vf exp(vf x) {
    x = min(max(x, splat(-87.0f)), splat(88.0f));
    const vf n = round(x * splat(1.44269504f));
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return p * bits_to_float((to_int(n) + 127) << 23);
}

INLINE vf silu(vf g) { return g / (exp(-g) + splat(1.0f)); }

// 0.5 g (1 + tanh u) is g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3).
INLINE vf gelu(vf g) {
    const vf u2 = splat(1.5957691216f) * g * fma(splat(0.044715f) * g, g, splat(1.0f));
    return g / (exp(-u2) + splat(1.0f));
}

constexpr int64_t GATE_JOB = 4096;  // elements

struct Gate {
    const float *gate, *up;
    int64_t n;
    float* y;
};

template <vf (*ACT)(vf)>
void gate_job(const void* context, int64_t index, void*) {
    const Gate& g = *static_cast<const Gate*>(context);
    const int64_t end = least((index + 1) * GATE_JOB, g.n);
    int64_t k = index * GATE_JOB;
    for (; k + LANES <= end; k += LANES) store(g.y + k, ACT(load(g.gate + k)) * load(g.up + k));
    if (k < end) {
        float part[LANES] = {};
        memcpy(part, g.gate + k, (size_t)(end - k) * sizeof(float));
        store(part, ACT(load(part)));
        for (int64_t i = k; i < end; i++) g.y[i] = part[i - k] * g.up[i];
    }
}

template <vf (*ACT)(vf)>
Status gated(const float* gate, const float* up, int64_t n, float* y) {
    const Gate g{gate, up, n, y};
    return shoal::parallel(ceil_div(n, GATE_JOB), 4 * n, gate_job<ACT>, &g, 0);
}

}  // namespace

#define NAME_(home) #home
#define NAME(home) NAME_(home)

namespace shoal {
namespace homes {
extern const Home SHOAL_HOME;
const Home SHOAL_HOME = {NAME(SHOAL_HOME), linear, gather_rows, rms_norm, gated<silu>, gated<gelu>};
}  // namespace homes
}  // namespace shoal
