// Attention of a whole step in one layer: stores its keys and values in their pages, then every row attends to its
// sequence.
//
// Knows pages and how the work is cut into jobs: first to store, by (page, K/V head), then to attend, by (tile of rows,
// some K/V heads), large tiles also by span. The arithmetic is in `attention_span.h`; the cut does not change it.
#pragma once
#include "attention_span.h"
#include "elementwise.h"
#include "rope.h"

namespace {

constexpr int64_t LOOK_ROWS = 96;   // widening a page costs as much as its use by two rows
constexpr int64_t THREAD_PARTS = 4;  // what is more than 1/4 of a thread's share is cut into spans, then into heads
constexpr int64_t MOST_PART_FLOATS = 4 << 20;  // that cut tiles may take

constexpr int64_t STORED_AHEAD = 4;  // the rows of a head are far apart in q, k and v, and processors do not see that coming

constexpr float LOG2_E = 1.44269504f;  // so that weights are powers of two

// Some rows of a segment, all stored in one page.
struct Piece {
    int32_t segment, from, to;  // rows of the segment
};

// Rows of a segment that attend together, for K/V heads [kv_head, kv_head + heads).
struct Look {
    int32_t segment, kv_head, heads, from, to;  // rows of the segment
    int64_t first, first_span, spans;           // first: the first position that any row sees
    bool by_span;                               // whether spans are jobs of their own
    float* parts;                               // if so, a Result for each
};

struct LookJob {
    const Look* look;
    int64_t span;  // or -1: all of them
};

struct Attending {
    const shoal::Attention& a;
    float* out;
    Layout layout;
    int64_t group, most_rows, most_heads, bench_floats;
    float *q, *benches;  // q (kv_heads, tokens, group, head_dim): normalised, rotated, scaled
    Piece* pieces;
    Look* looks;
    LookJob* jobs;
    int64_t job_count;

    const shoal::Segment& segment(int64_t index) const { return a.segments.all[index]; }
    float* queries(int64_t kv_head, int64_t token) const {
        return q + (kv_head * a.segments.tokens + token) * group * layout.dim;
    }
    uint8_t* page(const shoal::Segment& s, int64_t position, int64_t kv_head) const {
        const int64_t number = a.segments.pages[s.pages + position / PAGE];
        return a.kv.data + number * a.kv.page_bytes + kv_head * layout.head_bytes;
    }
    float* bench(int worker) const { return benches + worker * bench_floats; }
    int64_t rows(const Look& l) const { return (l.to - l.from) * group; }  // of each head
    int64_t all_rows(const Look& l) const { return l.heads * rows(l); }
    int64_t work(const Look& l, int64_t positions) const { return 2 * rows(l) * positions * layout.dim; }  // of each head
    Result part(const Look& l, int64_t span) const {
        const int64_t floats = Result::floats(all_rows(l), layout.wide);
        return Result(l.parts + (span - l.first_span) * floats, all_rows(l), layout.wide);
    }
    // Where a job begins to read.
    const uint8_t* begin(const LookJob& job) const {
        const Look& l = *job.look;
        return page(segment(l.segment), most(l.first, job.span * SPAN), l.kv_head);
    }
};

// Makes a head of a token ready, as a key or as a query: normalised if there is a weight, and rotated.
INLINE void ready(const Attending& w, const float* x, const float* norm, int64_t token, float* y) {
    if (norm) normalise(x, norm, w.a.norm_eps, w.layout.dim, y);
    else memcpy(y, x, (size_t)w.layout.dim * sizeof(float));
    rotate(w.a.rotation, token, y);
}

// From row by row (tokens, row_bytes) to dimension by dimension (dim, PAGE).
template <int BYTES>
void put_columns(const uint8_t* rows, int64_t tokens, int64_t row_bytes, int64_t dim, uint8_t* columns) {
    for (int64_t d = 0; d < dim; d++) {
        for (int64_t t = 0; t < tokens; t++) {
            memcpy(columns + (d * PAGE + t) * BYTES, rows + t * row_bytes + d * BYTES, BYTES);
        }
    }
}

INLINE void fetch(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(x + i);
}

// Stores the rows of one page for one K/V head, and makes the queries of its group ready.
template <class Cell>
void store_job(const void* context, int64_t index, int worker) {
    const Attending& w = *static_cast<const Attending*>(context);
    const shoal::Attention& a = w.a;
    const int64_t heads = a.kv.kv_heads, kv_head = index % heads, dim = w.layout.dim, wide = w.layout.wide;
    const Piece& piece = w.pieces[index / heads];
    const shoal::Segment& s = w.segment(piece.segment);
    const int64_t column = (s.start + piece.from) % PAGE, tokens = piece.to - piece.from;
    uint8_t* head = w.page(s, s.start + piece.from, kv_head);
    uint8_t* values = head + w.layout.values + column * wide * Cell::bytes;
    float* scales = reinterpret_cast<float*>(head + w.layout.scales) + column;

    // A key has a number in each of `dim` places.
    for (int64_t d = 0; d < dim; d++) __builtin_prefetch(head + (d * PAGE + column) * Cell::bytes, 1, 2);

    float* row = w.bench(worker);
    uint8_t* cells = reinterpret_cast<uint8_t*>(row + wide);
    memset(row, 0, (size_t)wide * sizeof(float));
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t token = s.first + piece.from + t, at = (token * heads + kv_head) * dim;
        if (t + STORED_AHEAD < tokens) {
            const int64_t later = at + STORED_AHEAD * heads * dim;
            fetch(a.k + later, dim);
            fetch(a.v + later, dim);
            fetch(a.q + later * w.group, w.group * dim);
        }
        ready(w, a.k + at, a.k_norm, token, row);
        const float key_scale = encode<Cell>(row, wide, cells + t * wide * Cell::bytes);
        memcpy(row, a.v + at, (size_t)dim * sizeof(float));
        const float value_scale = encode<Cell>(row, wide, values + t * wide * Cell::bytes);
        if (Cell::scaled) {
            scales[t] = key_scale;
            scales[PAGE + t] = value_scale;
        }
        float* q = w.queries(kv_head, token);
        for (int64_t g = 0; g < w.group; g++, q += dim) {
            ready(w, a.q + ((token * heads + kv_head) * w.group + g) * dim, a.q_norm, token, q);
            for (int64_t d = 0; d < dim; d++) q[d] *= a.scale * LOG2_E;
        }
    }
    put_columns<Cell::bytes>(cells, tokens, wide * Cell::bytes, dim, head + column * Cell::bytes);
}

// Divides the sums of rows by their totals and writes them to the result.
void finish(const Attending& w, const Look& l, const Result& result) {
    const int64_t dim = w.layout.dim, first = w.segment(l.segment).first;
    const Seen* seen = result.seen;
    const float* from = result.out;
    for (int64_t head = l.kv_head; head < l.kv_head + l.heads; head++) {
        for (int64_t token = first + l.from; token < first + l.to; token++) {
            float* out = w.out + (token * w.a.kv.kv_heads + head) * w.group * dim;
            for (int64_t g = 0; g < w.group; g++, seen++, from += w.layout.wide, out += dim) {
                const float inverse = 1.0f / seen->total;
                for (int64_t d = 0; d < dim; d++) out[d] = from[d] * inverse;
            }
        }
    }
}

template <class Cell>
void look_job(const void* context, int64_t index, int worker) {
    const Attending& w = *static_cast<const Attending*>(context);
    const Look& l = *w.jobs[index].look;
    const shoal::Segment& s = w.segment(l.segment);
    const Queries queries{w.queries(l.kv_head, s.first + l.from),
                          l.heads,
                          w.a.segments.tokens * w.group * w.layout.dim,
                          w.rows(l),
                          w.group,
                          s.start + l.from,
                          w.a.window,
                          w.a.segments.pages + s.pages,
                          w.a.kv.data + l.kv_head * w.layout.head_bytes,
                          w.a.kv.page_bytes,
                          index + 1 < w.job_count ? w.begin(w.jobs[index + 1]) : nullptr};
    const Bench bench(w.bench(worker), w.most_rows, w.most_heads, w.layout.wide);
    const int64_t span = w.jobs[index].span;
    if (span >= 0) {
        attend_span<Cell>(queries, w.layout, span, bench, w.part(l, span));
        return;
    }
    attend_span<Cell>(queries, w.layout, l.first_span, bench, bench.all);
    for (int64_t next = l.first_span + 1; next < l.first_span + l.spans; next++) {
        attend_span<Cell>(queries, w.layout, next, bench, bench.part);
        fold(bench.all, bench.part, w.all_rows(l), w.layout.wide);
    }
    finish(w, l, bench.all);
}

// Folds spans that were jobs of their own.
void fold_job(const void* context, int64_t index, int) {
    const Attending& w = *static_cast<const Attending*>(context);
    const Look& l = w.looks[index];
    if (!l.by_span) return;
    const Result all = w.part(l, l.first_span);
    for (int64_t next = l.first_span + 1; next < l.first_span + l.spans; next++) {
        fold(all, w.part(l, next), w.all_rows(l), w.layout.wide);
    }
    finish(w, l, all);
}

template <class Visit>
void each_piece(const Attending& w, Visit visit) {
    for (int64_t i = 0; i < w.a.segments.count; i++) {
        const shoal::Segment& s = w.segment(i);
        for (int32_t from = 0, to; from < s.tokens; from = to) {
            to = least(s.tokens, from + (int32_t)(PAGE - (s.start + from) % PAGE));
            visit(Piece{(int32_t)i, from, to});
        }
    }
}

// Tiles of rows, without heads. Later rows come first, because they see more.
template <class Visit>
void each_tile(const Attending& w, Visit visit) {
    const int32_t tile = (int32_t)(w.group < LOOK_ROWS ? LOOK_ROWS / w.group : 1);
    for (int64_t i = 0; i < w.a.segments.count; i++) {
        const shoal::Segment& s = w.segment(i);
        for (int32_t to = s.tokens, from; to > 0; to = from) {
            from = (to - 1) / tile * tile;
            const int64_t end = s.start + to, unseen = w.a.window ? s.start + from + 1 - w.a.window : 0;
            const int64_t first = unseen > 0 ? unseen : 0, span = first / SPAN;
            visit(Look{(int32_t)i, 0, 0, from, to, first, span, ceil_div(end, SPAN) - span, false, nullptr}, end - first);
        }
    }
}

// Looks of `large` multiply-adds at most, if that can be, with as many heads as have room for their rows.
template <class Visit>
void each_look(const Attending& w, int64_t large, Visit visit) {
    int64_t part_floats = 0;
    each_tile(w, [&](Look l, int64_t sees) {
        const int64_t heads = w.a.kv.kv_heads, rows = w.rows(l), work = w.work(l, sees);
        const int64_t floats = l.spans * Result::floats(heads * rows, w.layout.wide);
        const int64_t fit = least(heads, most<int64_t>(LOOK_ROWS / rows, 1));
        l.by_span = l.spans > 1 && fit * work > large && part_floats + floats <= MOST_PART_FLOATS;
        if (l.by_span) part_floats += floats;
        const int64_t job_work = l.by_span ? w.work(l, least(sees, SPAN)) : work;
        const int64_t groups = ceil_div(heads, most<int64_t>(least(fit, large / job_work), 1));
        for (int64_t i = 0; i < groups; i++) {
            l.kv_head = (int32_t)(heads * i / groups);
            l.heads = (int32_t)(heads * (i + 1) / groups) - l.kv_head;
            visit(l);
        }
    });
}

// Lays arrays one after the other in one piece of memory. Without memory it only counts how much they take.
struct Carve {
    char* memory;
    size_t used;
    template <class T>
    T* take(int64_t count) {
        T* at = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += ((size_t)count * sizeof(T) + 63) / 64 * 64;
        return at;
    }
};

template <class Cell>
shoal::Status attend(const shoal::Attention& a, float* out) {
    const int64_t group = a.kv.heads / a.kv.kv_heads, dim = a.kv.head_dim, heads = a.kv.kv_heads;
    shoal::Turn turn;
    const int threads = turn.threads();
    Attending w{a, out, Layout(dim, Cell::bytes, Cell::scaled), group, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
    int64_t pieces = 0, looks = 0, part_floats = 0, work = 0;
    each_piece(w, [&](const Piece&) { pieces++; });
    each_tile(w, [&](const Look& l, int64_t sees) { work += heads * w.work(l, sees); });
    const int64_t large = threads > 1 ? work / (THREAD_PARTS * threads) : work;
    each_look(w, large, [&](const Look& l) {
        looks++;
        w.job_count += l.by_span ? l.spans : 1;
        part_floats += l.by_span ? l.spans * Result::floats(w.all_rows(l), w.layout.wide) : 0;
        w.most_rows = most(w.most_rows, w.all_rows(l));
        w.most_heads = most<int64_t>(w.most_heads, l.heads);
    });
    w.bench_floats = Bench::floats(w.most_rows, w.most_heads, w.layout.wide) / 16 * 16 + 32;
    Carve carve{nullptr, 0};
    float* results = nullptr;
    for (int pass = 0; pass < 2; pass++) {
        w.q = carve.take<float>(a.segments.tokens * a.kv.heads * dim);
        w.benches = carve.take<float>(threads * w.bench_floats);
        results = carve.take<float>(part_floats);
        w.pieces = carve.take<Piece>(pieces);
        w.looks = carve.take<Look>(looks);
        w.jobs = carve.take<LookJob>(w.job_count);
        if (pass == 0) carve = {static_cast<char*>(turn.reserve(carve.used)), 0};
        if (!carve.memory) return shoal::NO_MEMORY;
    }
    Piece* piece = w.pieces;
    each_piece(w, [&](const Piece& p) { *piece++ = p; });
    Look* look = w.looks;
    LookJob* job = w.jobs;
    each_look(w, large, [&](Look l) {
        if (l.by_span) {
            l.parts = results;
            results += l.spans * Result::floats(w.all_rows(l), w.layout.wide);
        }
        *look = l;
        for (int64_t i = 0; i < (l.by_span ? l.spans : 1); i++) *job++ = {look, l.by_span ? l.first_span + i : -1};
        look++;
    });
    turn.run(pieces * heads, 4 * a.segments.tokens * (a.kv.heads + 2 * heads) * dim, store_job<Cell>, &w);
    turn.run(w.job_count, work, look_job<Cell>, &w);
    if (part_floats) turn.run(looks, part_floats, fold_job, &w);
    return shoal::OK;
}

shoal::Status attention(const shoal::Attention& a, float* out) {
    if (a.segments.tokens == 0) return shoal::OK;
    switch (a.kv.cell) {
        case shoal::CELL_F32: return attend<CellF32>(a, out);
        case shoal::CELL_F16: return attend<CellF16>(a, out);
        case shoal::CELL_BF16: return attend<CellBF16>(a, out);
        case shoal::CELL_I8: return attend<CellI8>(a, out);
    }
    return shoal::BAD_TYPE;
}

}  // namespace
