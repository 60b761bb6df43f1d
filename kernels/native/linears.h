// Products of one or more matrices and the same inputs, which are packed once and multiplied in one run of jobs.
#pragma once
#include "elementwise.h"
#include "linear_bf16.h"
#include "linear_float.h"
#include "linear_quantised.h"

namespace {

using shoal::Linear;
using shoal::Status;

// By GGUF type id.
const Type* find_type(int32_t id) {
    static constexpr Type types[] = {
        float_type<F32>(),      float_type<F16>(),      quantised_type<Q4_0>(), quantised_type<Q4_1>(), {},
        {},                     quantised_type<Q5_0>(), quantised_type<Q5_1>(), quantised_type<Q8_0>(), {},
        quantised_type<Q2_K>(), quantised_type<Q3_K>(), quantised_type<Q4_K>(), quantised_type<Q5_K>(), quantised_type<Q6_K>(),
        {},                     {},                     {},                     {},                     {},
        quantised_type<IQ4_NL>(),
    };
    static constexpr Type bf16 = bf16_type();
    if (id == 30) return &bf16;
    if (id < 0 || id >= (int32_t)(sizeof types / sizeof types[0]) || !types[id].decode) return nullptr;
    return &types[id];
}

constexpr int64_t FEW_JOB_BYTES = 32 << 10;  // of weights: some microseconds, so that threads finish together

int64_t whole_lines(size_t bytes) { return (int64_t)((bytes + 63) / 64 * 64); }

// A matrix with its kernels, cut into jobs of rows.
struct Product {
    const Linear* linear;
    const Type* type;
    const Multiply* by;
    int64_t job_rows, jobs;

    Status find(const Linear& l) {
        linear = &l;
        type = find_type(l.w.type);
        if (!type) return shoal::BAD_TYPE;
        by = &type->by[l.input_bits == 8];
        return shoal::OK;
    }
    // For products with `tokens` at once: several jobs for each of `threads`.
    void cut(int64_t tokens, int threads, int64_t all_rows) {
        const int64_t rows = linear->w.rows, row_bytes = linear->w.cols / type->block_weights * type->block_bytes;
        const int64_t some = ceil_div(FEW_JOB_BYTES, 2 * BAND * row_bytes) * 2 * BAND;
        const int64_t share = ceil_div(all_rows, 8 * BAND * threads) * 2 * BAND;  // four jobs a thread
        job_rows = tokens > by->few_tokens ? TILE_ROWS : least(least(some, share), TILE_ROWS);
        jobs = ceil_div(rows, job_rows);
    }
    int64_t job_size(int64_t job) const { return least(job_rows, linear->w.rows - job * job_rows); }

    void multiply(int64_t row0, int64_t rows, const Tokens& x, const Output& y, char* scratch) const {
        if (x.count <= by->few_tokens) by->few(linear->w, row0, rows, x, y);
        else by->many(linear->w, row0, rows, x, y, scratch);
        if (!linear->bias) return;
        for (int64_t t = 0; t < x.count; t++) {
            for (int64_t r = 0; r < rows; r++) y.row(t)[r] += linear->bias[row0 + r];
        }
    }
};

template <class Bits, class Scheme>
void pack_groups(const float* x, int64_t count, char* out) {
    auto* groups = reinterpret_cast<Input<Scheme>*>(out);
    int64_t k = 0;
    for (; k + GROUP <= count; k += GROUP) pack_group<Bits>(x + k, groups[k / GROUP]);
    if (k == count) return;
    float last[GROUP] = {};
    memcpy(last, x + k, (size_t)(count - k) * sizeof(float));
    pack_group<Bits>(last, groups[k / GROUP]);
}

// How groups of inputs come into a form.
struct Packer {
    size_t group_bytes;
    void (*pack)(const float* x, int64_t count, char* out);  // the last group is filled up with zeros
};

template <class Bits, class Scheme>
constexpr Packer packer{sizeof(Input<Scheme>), pack_groups<Bits, Scheme>};

constexpr Packer PACKERS[FORMS] = {
    {}, packer<Bits16, Planes>, packer<Bits16, Words>, packer<Bits8, Bytes>, packer<Bits8, Words>, packer<Bits14, Words>};

// The inputs of some tokens in the forms that matrices need.
struct Packed {
    int64_t cols;
    unsigned forms;              // a bit for each
    int64_t at[FORMS], bytes;    // of a token
    char* memory;

    void need(Form form) { forms |= 1u << form; }
    int64_t token_bytes() {
        bytes = 0;
        for (int form = 0; form < FORMS; form++) {
            at[form] = bytes;
            if (!(forms >> form & 1)) continue;
            bytes += form == FLOATS ? whole_lines((size_t)(ceil_div(cols, 16) * 16) * sizeof(float))
                                    : whole_lines((size_t)ceil_div(cols, GROUP) * PACKERS[form].group_bytes);
        }
        return bytes += 64;  // no power of two, or tokens would compete for cache lines
    }
    char* token(int64_t index, Form form) const { return memory + index * bytes + at[form]; }
    float* as_floats(int64_t index) const { return reinterpret_cast<float*>(token(index, FLOATS)); }
    // Columns [from, from + count) of a token, whole groups or up to the last column, in some of the forms.
    void put(int64_t index, int64_t from, int64_t count, const float* x, unsigned some) const {
        if (some >> FLOATS & 1) {
            float* out = as_floats(index) + from;
            if (out != x) memcpy(out, x, (size_t)count * sizeof(float));
            if (from + count == cols) memset(out + count, 0, (size_t)(ceil_div(cols, 16) * 16 - cols) * sizeof(float));
        }
        for (int form = FLOATS + 1; form < FORMS; form++) {
            const Packer& packer = PACKERS[form];
            if (some >> form & 1) packer.pack(x, count, token(index, (Form)form) + from / GROUP * packer.group_bytes);
        }
    }
};

// Packs tokens, which are normalised first if there is a norm.
struct Packing {
    shoal::Inputs x;
    int64_t token0;
    Packed* packed;
};

void pack_job(const void* context, int64_t token, int) {
    const Packing& p = *static_cast<const Packing*>(context);
    const int64_t cols = p.packed->cols;
    const float* x = p.x.x + (p.token0 + token) * cols;
    // What another core has written comes line by line otherwise, 0.1 us each.
    for (int64_t k = 0; k < cols; k += 16) __builtin_prefetch(x + k);
    if (p.x.norm) {
        float* normal = p.packed->as_floats(token);
        normalise(x, p.x.norm, p.x.eps, cols, normal);
        x = normal;
    }
    p.packed->put(token, 0, cols, x, p.packed->forms);
}

constexpr int MOST_LINEARS = 8;

struct Linears {
    Product products[MOST_LINEARS];
    float* const* y;
    int64_t token0, tokens;
    Packed packed;
    char* scratch;  // one part for each thread
    int64_t scratch_bytes;
};

void linears_job(const void* context, int64_t index, int worker) {
    const Linears& l = *static_cast<const Linears*>(context);
    int i = 0;
    while (index >= l.products[i].jobs) index -= l.products[i++].jobs;
    const Product& p = l.products[i];
    const char* in[TILE_TOKENS];
    for (int64_t t = 0; t < l.tokens; t++) in[t] = l.packed.token(t, p.by->form(l.tokens));
    const int64_t row0 = index * p.job_rows, stride = p.linear->w.rows;
    p.multiply(row0, p.job_size(index), {in, l.tokens}, {l.y[i] + l.token0 * stride + row0, stride},
               l.scratch + worker * l.scratch_bytes);
}

// y[i] (tokens, rows of linear i) = x @ linear i.
Status linears(const shoal::Inputs& x, int64_t tokens, int count, const Linear* all, float* const* y) {
    if (count > MOST_LINEARS) return shoal::BAD_TYPE;
    Linears l{};
    if (!tokens) return shoal::OK;
    const Tiling tiling{tokens};
    const int64_t at_once = tiling.longest();
    int64_t rows = 0, weights = 0, jobs = 0;
    l.packed.cols = x.cols;
    if (x.norm) l.packed.need(FLOATS);
    l.y = y;
    for (int i = 0; i < count; i++) {
        if (const Status status = l.products[i].find(all[i])) return status;
        const Multiply& by = *l.products[i].by;
        l.packed.need(by.form(at_once));
        if (at_once > by.few_tokens) l.scratch_bytes = most(l.scratch_bytes, (int64_t)by.scratch_bytes);
        rows += all[i].w.rows;
        weights += all[i].w.rows * x.cols;
    }
    if (!rows) return shoal::OK;
    shoal::Turn turn;
    const int64_t token_bytes = l.packed.token_bytes();
    l.scratch = static_cast<char*>(turn.reserve((size_t)(turn.threads() * l.scratch_bytes + at_once * token_bytes)));
    if (!l.scratch) return shoal::NO_MEMORY;
    l.packed.memory = l.scratch + turn.threads() * l.scratch_bytes;
    for (int i = 0; i < count; i++) {
        l.products[i].cut(at_once, turn.threads(), rows);
        jobs += l.products[i].jobs;
    }
    for (int64_t tile = 0; tile < tiling.tiles(); tile++) {
        l.token0 = tiling.start(tile);
        l.tokens = tiling.length(tile);
        const Packing packing{x, l.token0, &l.packed};
        turn.run(l.tokens, l.tokens * x.cols, pack_job, &packing);
        turn.run(jobs, weights * l.tokens, linears_job, &l);
    }
    return shoal::OK;
}

// y (tokens, rows) = x @ router, the same bits on every machine. Inputs of quantised weights are not rounded.
Status scores(const shoal::Inputs& x, int64_t tokens, const Linear& router, float* y) {
    const Type* type = find_type(router.w.type);
    if (!type) return shoal::BAD_TYPE;
    const shoal::Weights& w = router.w;
    const int64_t row_jobs = ceil_div(w.rows, SCORE_JOB_ROWS), jobs = row_jobs * ceil_div(tokens, SCORE_JOB_TOKENS);
    const ScoresOf multiply = w.type == 30 ? scores_of<BF16> : w.type == 1 ? scores_of<F16> : scores_of<F32>;
    Scores s{router, *type, multiply, x.x, tokens, row_jobs, y, nullptr, 0};
    shoal::Turn turn;
    if (type->quantised) {
        s.scratch_bytes = whole_lines((size_t)(SCORE_JOB_ROWS * w.cols) * sizeof(float));
        s.scratch = static_cast<char*>(turn.reserve((size_t)(turn.threads() * s.scratch_bytes)));
        if (!s.scratch) return shoal::NO_MEMORY;
    }
    turn.run(jobs, tokens * w.rows * w.cols, scores_job, &s);
    return shoal::OK;
}

struct Gather {
    const shoal::Weights& w;
    const Type& type;
    const int64_t* ids;
    float* out;
};

void gather_job(const void* context, int64_t index, int) {
    const Gather& g = *static_cast<const Gather*>(context);
    g.type.decode(g.w, g.ids ? g.ids[index] : index, g.out + index * g.w.cols);
}

Status gather_rows(const shoal::Weights& w, const int64_t* ids, int64_t count, float* out) {
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

}  // namespace
