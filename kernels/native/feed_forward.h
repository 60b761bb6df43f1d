// Gated feed-forward layers, dense or of many experts: (act(x @ gate.T) * (x @ up.T)) @ down.T.
//
// A job computes some rows of gate and up and packs their results at once as inputs of down, so they are never stored
// as floats. A layer is three runs of jobs: inputs, gate and up, down. A dense layer is an expert that takes every
// token.
#pragma once
#include "linears.h"

namespace {

using shoal::Routing;

// An expert with its tokens. Pairs of an expert and a token are numbered; its own are [first, first + count).
struct Expert {
    Product gate, up, down;
    int64_t first, count;

    Tiling tiling() const { return {count}; }
};

struct FeedForward {
    Routing routing;
    shoal::Activation act;
    Packed inputs;  // by token
    Packed hidden;  // by pair
    float* y;
    int64_t y_rows, down_rows, tokens;
    char* scratch;  // one part for each thread
    int64_t scratch_bytes;
    Expert* experts;

    int64_t token_of(int64_t pair) const { return routing.tokens ? routing.tokens[pair] : pair; }  // dense: all tokens
};

// The results of a job before they are packed or added up.
struct alignas(64) Partial {
    float first[TILE_TOKENS * TILE_ROWS], second[TILE_TOKENS * TILE_ROWS];
};

template <vf (*ACT)(vf)>
void activate(float* gate, const float* up, int64_t count) {
    for (int64_t k = 0; k < count; k += LANES) store(gate + k, ACT(load(gate + k)) * load(up + k));
}

// Some rows of one expert's gate and up, for all its tokens.
void gate_up_job(const void* context, int64_t index, int worker) {
    const FeedForward& f = *static_cast<const FeedForward*>(context);
    const Expert* e = f.experts;
    while (index >= e->gate.jobs) index -= e++->gate.jobs;
    char* scratch = f.scratch + worker * f.scratch_bytes;
    Partial& partial = *reinterpret_cast<Partial*>(scratch);
    const int64_t row0 = index * e->gate.job_rows, rows = e->gate.job_size(index);
    const int64_t stride = ceil_div(rows, LANES) * LANES;
    const Output gate{partial.first, stride}, up{partial.second, stride};
    for (int64_t tile = 0; tile < e->tiling().tiles(); tile++) {
        const int64_t first = e->first + e->tiling().start(tile), count = e->tiling().length(tile);
        const char* in[TILE_TOKENS];
        for (int64_t t = 0; t < count; t++) in[t] = f.inputs.token(f.token_of(first + t), e->gate.by->form(count));
        e->gate.multiply(row0, rows, {in, count}, gate, scratch + sizeof(Partial));
        for (int64_t t = 0; t < count; t++) in[t] = f.inputs.token(f.token_of(first + t), e->up.by->form(count));
        e->up.multiply(row0, rows, {in, count}, up, scratch + sizeof(Partial));
        for (int64_t t = 0; t < count; t++) {
            f.act == shoal::SILU ? activate<silu>(gate.row(t), up.row(t), rows) : activate<gelu>(gate.row(t), up.row(t), rows);
            f.hidden.put(first + t, row0, rows, gate.row(t), 1u << e->down.by->form(count));
        }
    }
}

// Some rows of down, for all experts in turn.
void down_job(const void* context, int64_t index, int worker) {
    const FeedForward& f = *static_cast<const FeedForward*>(context);
    char* scratch = f.scratch + worker * f.scratch_bytes;
    Partial& partial = *reinterpret_cast<Partial*>(scratch);
    const int64_t row0 = index * f.down_rows, rows = least(f.down_rows, f.y_rows - row0);
    const Output y{f.y + row0, f.y_rows};
    for (const Expert* e = f.experts; e < f.experts + f.routing.experts; e++) {
        for (int64_t tile = 0; tile < e->tiling().tiles(); tile++) {
            const int64_t first = e->first + e->tiling().start(tile), count = e->tiling().length(tile);
            const char* in[TILE_TOKENS];
            for (int64_t t = 0; t < count; t++) in[t] = f.hidden.token(first + t, e->down.by->form(count));
            const Output out = f.routing.factors ? Output{partial.first, TILE_ROWS} : Output{y.row(first), y.stride};
            e->down.multiply(row0, rows, {in, count}, out, scratch + sizeof(Partial));
            if (!f.routing.factors) continue;
            for (int64_t t = 0; t < count; t++) {
                float* sum = y.row(f.token_of(first + t));
                const float factor = f.routing.factors[first + t];
                for (int64_t r = 0; r < rows; r++) sum[r] += factor * out.row(t)[r];
            }
        }
    }
}

// Finds out what the types of an expert's three matrices need if `tokens` tokens go to it.
Status prepare(FeedForward& f, const Linear* three, int64_t tokens) {
    Expert e;
    Product* const products[] = {&e.gate, &e.up, &e.down};
    for (int i = 0; i < 3; i++) {
        if (const Status status = products[i]->find(three[i])) return status;
        const Multiply& by = *products[i]->by;
        (i < 2 ? f.inputs : f.hidden).need(by.form(tokens));
        f.scratch_bytes = most(f.scratch_bytes, (int64_t)by.scratch_bytes);
    }
    return shoal::OK;
}

Status feed_forward(const shoal::Inputs& x, int64_t tokens, shoal::Activation act, const Linear* const* all,
                    const Routing& routing, float* y) {
    FeedForward f{};
    f.routing = routing;
    f.act = act;
    f.tokens = tokens;
    f.inputs.cols = x.cols;
    if (x.norm) f.inputs.need(FLOATS);
    f.hidden.cols = all[0][0].w.rows;
    f.y = y;
    f.y_rows = all[0][2].w.rows;
    for (int64_t i = 0; i < routing.experts; i++) {
        if (const Status status = prepare(f, all[i], routing.starts[i + 1] - routing.starts[i])) return status;
    }
    f.scratch_bytes += (int64_t)sizeof(Partial);

    shoal::Turn turn;
    const int threads = turn.threads();
    const int64_t input_bytes = tokens * f.inputs.token_bytes();
    const int64_t hidden_bytes = routing.starts[routing.experts] * f.hidden.token_bytes();
    const int64_t expert_bytes = whole_lines((size_t)routing.experts * sizeof(Expert));
    char* memory = static_cast<char*>(
        turn.reserve((size_t)(threads * f.scratch_bytes + input_bytes + hidden_bytes + expert_bytes)));
    if (!memory) return shoal::NO_MEMORY;
    f.scratch = memory;
    f.inputs.memory = memory + threads * f.scratch_bytes;
    f.hidden.memory = f.inputs.memory + input_bytes;
    f.experts = reinterpret_cast<Expert*>(f.hidden.memory + hidden_bytes);

    int64_t jobs = 0, weights = 0;
    for (int64_t i = 0; i < routing.experts; i++) {
        Expert& e = f.experts[i];
        e.first = routing.starts[i];
        e.count = routing.starts[i + 1] - e.first;
        e.gate.find(all[i][0]);
        e.up.find(all[i][1]);
        e.down.find(all[i][2]);
        e.gate.cut(e.count, threads, f.hidden.cols * routing.experts);
        e.down.cut(e.count, threads, f.y_rows);
        f.down_rows = i ? least(f.down_rows, e.down.job_rows) : e.down.job_rows;
        jobs += e.gate.jobs;
        weights += f.hidden.cols * x.cols * e.count;
    }
    const Packing packing{x, 0, &f.inputs};
    turn.run(tokens, tokens * x.cols, pack_job, &packing);
    turn.run(jobs, 2 * weights, gate_up_job, &f);
    turn.run(ceil_div(f.y_rows, f.down_rows), weights, down_job, &f);
    return shoal::OK;
}

// Takes some of the tokens at a time, so that the packed results of gate and up stay small.
Status gated(const shoal::Inputs& x, int64_t tokens, shoal::Activation act, const Linear* three, float* y) {
    const Tiling tiling{tokens};
    for (int64_t i = 0; i < tiling.tiles(); i++) {
        const int64_t from = tiling.start(i), starts[2] = {0, tiling.length(i)};
        shoal::Inputs part = x;
        part.x += from * x.cols;
        const Routing all{1, starts, nullptr, nullptr};
        if (const Status status = feed_forward(part, starts[1], act, &three, all, y + from * three[2].w.rows)) {
            return status;
        }
    }
    return shoal::OK;
}

Status experts(const shoal::Inputs& x, int64_t tokens, shoal::Activation act, const Linear* const* all,
               const Routing& routing, float* y) {
    for (int64_t i = 0; i < routing.starts[routing.experts]; i++) {
        if (routing.tokens[i] < 0 || routing.tokens[i] >= tokens) return shoal::NO_ROW;
    }
    if (!tokens || !routing.experts) return shoal::OK;
    return feed_forward(x, tokens, act, all, routing, y);
}

}  // namespace
