// The kernels, compiled once for each kind of machine (SHOAL_HOME names it).
//
// The contract that shapes everything here: an element of a result is computed by the same sequence of
// float operations whatever is computed beside it. A dot product is `LANES` running sums over ascending
// columns, folded by `sum4`; decoding as it goes (one token) and multiplying decoded tiles (several)
// do exactly that, so batching, threads and tiling change no bit.
#include "attention.h"
#include "blocks.h"
#include "home.h"

namespace {

using shoal::Status;
using shoal::Weights;

constexpr int ROWS = 4;  // rows that share each load of x

// Running sums of four rows and one token.
struct Sums {
    vf rows[ROWS];
};

template <class T>
INLINE T least(T a, T b) {
    return a < b ? a : b;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The last `count` weights of a row of floats that do not fill a vector: a copy filled up with zeros.
template <class W>
struct Tail {
    alignas(64) uint8_t bytes[W::bytes] = {};
    INLINE Tail(const uint8_t* from, int64_t count) {
        memcpy(bytes, from, (size_t)(count * W::bytes / W::weights));
    }
};

// Sums over all columns for R rows and one token; sums[r] are lanes still to be folded.
template <class W, int R>
INLINE void dot(const uint8_t* w, int64_t row_bytes, const float* x, int64_t cols, vf* sums) {
    vf acc[R] = {};
    float scales[R][W::run * W::scales + 1];
    for (int64_t left = cols / W::weights; left > 0; left -= W::run) {
        const int run = (int)least<int64_t>(left, W::run);
        for (int r = 0; r < R; r++) {
            const uint8_t* row = w + r * row_bytes;
            for (int b = 0; b < run; b++) W::prepare(row + b * W::bytes, scales[r] + b * W::scales);
            keep_in_memory<float[W::run * W::scales + 1]>(scales[r]);
        }
        for (int b = 0; b < run; b++, w += W::bytes, x += W::weights) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                for (int i = 0; i < W::bytes; i += 64) __builtin_prefetch(w + (r + ROWS) * row_bytes + i);
                W::decode(w + r * row_bytes, scales[r] + b * W::scales,
                          [&](int at, vf v) INLINE_LAMBDA { acc[r] = fma(v, load(x + at), acc[r]); });
            }
        }
    }
    if (W::weights == LANES && cols % LANES) {
        float part[LANES] = {};
        memcpy(part, x, (size_t)(cols % LANES) * sizeof(float));
        for (int r = 0; r < R; r++) {
            const Tail<W> tail(w + r * row_bytes, cols % LANES);
            W::decode(tail.bytes, nullptr,
                      [&](int, vf v) INLINE_LAMBDA { acc[r] = fma(v, load(part), acc[r]); });
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
    float scales[W::run * W::scales + 1];
    for (int64_t left = cols / W::weights; left > 0; left -= W::run) {
        const int run = (int)least<int64_t>(left, W::run);
        for (int b = 0; b < run; b++) W::prepare(w + b * W::bytes, scales + b * W::scales);
        keep_in_memory<float[W::run * W::scales + 1]>(scales);
        for (int b = 0; b < run; b++, w += W::bytes, out += W::weights) {
            W::decode(w, scales + b * W::scales, [&](int at, vf v) INLINE_LAMBDA { store(out + at, v); });
        }
    }
    if (W::weights == LANES && cols % LANES) {
        const Tail<W> tail(w, cols % LANES);
        W::decode(tail.bytes, nullptr,
                  [&](int, vf v) INLINE_LAMBDA { memcpy(out, &v, (size_t)(cols % LANES) * sizeof(float)); });
    }
}

struct Type {
    void (*dot_rows)(const uint8_t*, int64_t, int64_t, const float*, int64_t, float*);
    void (*decode_row)(const uint8_t*, int64_t, float*);
    int64_t weights, bytes;  // of a block
};

template <class W>
constexpr Type type_of() {
    return {dot_rows<W>, decode_row<W>, W::weights, W::bytes};
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

// Columns are taken a chunk at a time, whole blocks of every type. In memory of our own, rows of a chunk lie
// STRIDE floats apart: no power of two, so that they do not compete for the same lines of a cache.
constexpr int64_t CHUNK = 1024;
constexpr int64_t STRIDE = CHUNK + LANES;

// Adds to the running sums of four decoded rows and T packed tokens, which are zero at first; `cols` is
// filled up with zeros to LANES.
template <int T>
void multiply(const float* w, const float* x, int64_t cols, bool first, Sums* sums) {
    vf acc[T][ROWS] = {};
    if (!first) memcpy(acc, sums, sizeof acc);
    for (int64_t k = 0; k < cols; k += LANES) {
        vf v[ROWS];
        for (int r = 0; r < ROWS; r++) v[r] = load(w + r * STRIDE + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const vf in = load(x + t * STRIDE + k);
            for (int r = 0; r < ROWS; r++) acc[t][r] = fma(v[r], in, acc[t][r]);
        }
    }
    memcpy(sums, acc, sizeof acc);
}

using Multiply = void (*)(const float*, const float*, int64_t, bool, Sums*);

Multiply multiply_of(int64_t tokens) {
    static constexpr Multiply all[] = {multiply<1>, multiply<2>, multiply<3>,
                                       multiply<4>, multiply<5>, multiply<6>};
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
    int64_t job_rows;
    // Of several tokens, those in hand:
    int64_t token0, tokens;
    float* packed;  // chunks of inputs, each (tokens, STRIDE)
    char* scratch;  // one Scratch for each worker
};

void dot_job(const void* context, int64_t index, int) {
    const Linear& l = *static_cast<const Linear*>(context);
    const int64_t start = index * l.job_rows, rows = least(l.job_rows, l.w.rows - start);
    l.type.dot_rows(row_of(l.w, start), l.w.row_bytes, rows, l.x, l.w.cols, l.y + start);
    if (l.bias) {
        for (int64_t r = start; r < start + rows; r++) l.y[r] += l.bias[r];
    }
}

constexpr int64_t DOT_JOB_BYTES = 32 << 10;  // of weights: some microseconds, so that threads end together
constexpr int64_t TILE_TOKENS = 96;          // decoding a row costs as much as multiplying it with 5 tokens
constexpr int64_t TILE_ROWS = 64;            // inputs come from afar once for so many rows

// Working memory of one thread: the decoded rows stay in the first-level cache, the sums in the second.
struct Scratch {
    float decoded[ROWS * STRIDE];
    Sums sums[TILE_ROWS / ROWS][TILE_TOKENS];
};

// Fills the end of the last vector of a row of `cols` floats with zeros.
INLINE void pad(float* row, int64_t cols) {
    for (int64_t k = cols; k % LANES; k++) row[k] = 0;
}

void pack_job(const void* context, int64_t token, int) {
    const Linear& l = *static_cast<const Linear*>(context);
    for (int64_t k = 0; k < l.w.cols; k += CHUNK) {
        const int64_t cols = least(CHUNK, l.w.cols - k);
        float* out = l.packed + (k / CHUNK * l.tokens + token) * STRIDE;
        memcpy(out, l.x + (l.token0 + token) * l.w.cols + k, (size_t)cols * sizeof(float));
        pad(out, cols);
    }
}

void tile_job(const void* context, int64_t index, int worker) {
    const Linear& l = *static_cast<const Linear*>(context);
    const int64_t row0 = index * l.job_rows, rows = least(l.job_rows, l.w.rows - row0);
    const int64_t groups = ceil_div(l.tokens, TOKENS);
    Scratch& scratch = reinterpret_cast<Scratch*>(l.scratch)[worker];
    for (int64_t k = 0; k < l.w.cols; k += CHUNK) {
        const int64_t cols = least(CHUNK, l.w.cols - k);
        const float* x = l.packed + k / CHUNK * l.tokens * STRIDE;
        for (int64_t r = 0; r < rows; r += ROWS) {
            for (int64_t i = 0; i < ROWS; i++) {  // beyond the last row: that row again, for sums nobody reads
                const uint8_t* row = row_of(l.w, row0 + least(r + i, rows - 1));
                float* out = scratch.decoded + i * STRIDE;
                l.type.decode_row(row + k / l.type.weights * l.type.bytes, cols, out);
                pad(out, cols);
            }
            for (int64_t g = 0; g < groups; g++) {
                const int64_t from = l.tokens * g / groups, until = l.tokens * (g + 1) / groups;
                Sums* sums = scratch.sums[r / ROWS] + from;
                multiply_of(until - from)(scratch.decoded, x + from * STRIDE, cols, k == 0, sums);
            }
        }
    }
    for (int64_t t = 0; t < l.tokens; t++) {
        float* y = l.y + (l.token0 + t) * l.w.rows + row0;
        for (int64_t r = 0; r < rows;) {
            const Sums& s = scratch.sums[r / ROWS][t];
            const vf4 sums = sum4(s.rows[0], s.rows[1], s.rows[2], s.rows[3]);
            for (const int64_t end = least(r + ROWS, rows); r < end; r++) {
                y[r] = l.bias ? sums[r % ROWS] + l.bias[row0 + r] : sums[r % ROWS];
            }
        }
    }
}

Status linear(const Weights& w, const float* x, int64_t tokens, const float* bias, float* y) {
    const Type* type = find_type(w.type);
    if (!type) return shoal::BAD_TYPE;
    if (w.rows == 0 || tokens == 0) return shoal::OK;
    shoal::Turn turn;
    const int64_t share = ceil_div(w.rows, 4 * ROWS * turn.threads()) * ROWS;  // four jobs for each thread
    Linear l{w, *type, x, bias, y, 0, 0, tokens, nullptr, nullptr};
    if (tokens == 1) {
        l.job_rows = least(share, ceil_div(DOT_JOB_BYTES, ROWS * w.row_bytes) * ROWS);
        turn.run(ceil_div(w.rows, l.job_rows), w.rows * w.cols, dot_job, &l);
        return shoal::OK;
    }
    l.job_rows = least(share, TILE_ROWS);
    const int64_t tiles = ceil_div(tokens, TILE_TOKENS), most = ceil_div(tokens, tiles);
    const size_t packed_bytes = (size_t)(ceil_div(w.cols, CHUNK) * most * STRIDE) * sizeof(float);
    l.scratch = static_cast<char*>(turn.reserve(packed_bytes + turn.threads() * sizeof(Scratch)));
    if (!l.scratch) return shoal::NO_MEMORY;
    l.packed = reinterpret_cast<float*>(l.scratch + turn.threads() * sizeof(Scratch));
    for (int64_t tile = 0; tile < tiles; tile++) {
        l.token0 = tokens * tile / tiles;
        l.tokens = tokens * (tile + 1) / tiles - l.token0;
        turn.run(l.tokens, l.tokens * w.cols, pack_job, &l);
        turn.run(ceil_div(w.rows, l.job_rows), w.rows * w.cols * l.tokens, tile_job, &l);
    }
    return shoal::OK;
}

struct Gather {
    const Weights& w;
    const Type& type;
    const int64_t* ids;
    float* out;
};

void gather_job(const void* context, int64_t index, int) {
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
    shoal::Turn().run(count, count * w.cols, gather_job, &g);
    return shoal::OK;
}

struct Norm {
    const float *x, *weight;
    float eps;
    int64_t cols;
    float* y;
};

void norm_job(const void* context, int64_t index, int) {
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
    shoal::Turn().run(rows, rows * cols, norm_job, &n);
    return shoal::OK;
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
void gate_job(const void* context, int64_t index, int) {
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
    shoal::Turn().run(ceil_div(n, GATE_JOB), 4 * n, gate_job<ACT>, &g);
    return shoal::OK;
}

}  // namespace

#define NAME_(home) #home
#define NAME(home) NAME_(home)

namespace shoal {
namespace homes {
extern const Home SHOAL_HOME;
const Home SHOAL_HOME = {NAME(SHOAL_HOME), linear, gather_rows, rms_norm, gated<silu>, gated<gelu>, attention};
}  // namespace homes
}  // namespace shoal
