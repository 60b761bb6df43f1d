// Attention of a tile of queries over one span of a sequence's keys and values.
//
// The contract of the whole: what a query sees does not depend, in any bit, on what is computed beside it. So positions
// are cut into spans that begin at multiples of SPAN. Within a span every sum runs over dimensions, positions or fixed
// lanes in ascending order; spans are folded in ascending order (online softmax, arXiv 1805.02867). Which rows share a
// register tile, and whether a page was widened to floats before, changes nothing.
#pragma once
#include "cells.h"
#include "home.h"

namespace {

constexpr int64_t PAGE = 64;   // positions
constexpr int64_t SPAN = 256;  // positions; at a long context the unit of work for one new token
constexpr int64_t SCORES = SPAN + 16;  // no power of two between rows, so that they do not compete for lines of a cache
constexpr int QUERIES = 6;        // queries that share each load of a key or value
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int QUERY_VECS = 4;  // 6 * 4 sums, 4 keys, 1 query of 32 registers
#else
constexpr int QUERY_VECS = 2;  // 6 * 2 sums, 2 keys, 1 query of 16 registers
#endif
constexpr int64_t DIRECT_ROWS = 2 * QUERIES;  // for more, a page is widened to floats once

// Where things are in a page, in bytes from the beginning of a K/V head's part.
struct Layout {
    int64_t dim, wide, values, scales, head_bytes;

    Layout(int64_t head_dim, int64_t cell_bytes, bool scaled) {
        dim = head_dim;
        wide = (head_dim + 15) / 16 * 16;
        values = PAGE * dim * cell_bytes;
        scales = values + PAGE * wide * cell_bytes;
        head_bytes = scales + (scaled ? 2 * PAGE * (int64_t)sizeof(float) : 0);
    }
};

// Queries of one K/V head: `group` rows of `dim` numbers for each of consecutive positions.
struct Queries {
    const float* q;
    int64_t rows, group, position;
    int64_t window;
    const int32_t* pages;  // of the sequence
    const uint8_t* head;   // the K/V head in page 0
    int64_t page_bytes;

    const uint8_t* page(int64_t index) const { return head + pages[index] * page_bytes; }
    int64_t last_position() const { return position + (rows - 1) / group; }
    // Columns [first, last) of a span that row r sees.
    int64_t first(int64_t r, int64_t span) const { return window ? seen(position + r / group + 1 - window, span) : 0; }
    int64_t last(int64_t r, int64_t span) const { return seen(position + r / group + 1, span); }

private:
    static int64_t seen(int64_t end, int64_t span) {
        const int64_t column = end - span * SPAN;
        return column < 0 ? 0 : column > SPAN ? SPAN : column;
    }
};

// What a row has seen of some spans: its greatest score, and the sum of its weights; 0 if nothing.
struct Seen {
    float peak, total;
};

// What rows have seen of some spans: `out` (rows, wide) is not yet divided by the totals.
struct Result {
    Seen* seen;
    float* out;
    static int64_t floats(int64_t rows, int64_t wide) { return rows * (wide + 2); }
    Result(float* memory, int64_t rows, int64_t wide)
        : seen(reinterpret_cast<Seen*>(memory + rows * wide)), out(memory) {}
};

// A thread's working memory, for at most so many rows.
struct Bench {
    float *scores, *page, *scales;
    Result part, all;
    static int64_t floats(int64_t rows, int64_t wide) {
        return rows * SCORES + PAGE * wide + 2 * SPAN + 2 * Result::floats(rows, wide);
    }
    Bench(float* memory, int64_t rows, int64_t wide)
        : scores(memory),
          page(scores + rows * SCORES),
          scales(page + PAGE * wide),
          part(scales + 2 * SPAN, rows, wide),
          all(scales + 2 * SPAN + Result::floats(rows, wide), rows, wide) {}
};

// scores (R, SCORES) of R queries with V vectors of a page's keys.
template <class Cell, int R, int V>
INLINE void score_columns(const float* q, int64_t dim, const uint8_t* keys, float* scores) {
    vf sum[R][V] = {};
    for (int64_t d = 0; d < dim; d++, keys += PAGE * Cell::bytes) {
        vf key[V];
        for (int v = 0; v < V; v++) key[v] = Cell::load(keys + v * LANES * Cell::bytes);
        for (int r = 0; r < R; r++) {
            const vf x = splat(q[r * dim + d]);
            for (int v = 0; v < V; v++) sum[r][v] = fma(x, key[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) store(scores + r * SCORES + v * LANES, sum[r][v]);
    }
}

// Columns [from, to) of a page, whole vectors.
template <class Cell, int R>
void score(const float* q, int64_t dim, const uint8_t* keys, int64_t from, int64_t to, float* scores) {
    for (; from + QUERY_VECS * LANES <= to; from += QUERY_VECS * LANES) {
        score_columns<Cell, R, QUERY_VECS>(q, dim, keys + from * Cell::bytes, scores + from);
    }
    for (; from < to; from += LANES) score_columns<Cell, R, 1>(q, dim, keys + from * Cell::bytes, scores + from);
}

// out (R, wide) += weights (R, SCORES) @ values, for V vectors of the values of positions [from, to) of a page.
template <class Cell, int R, int V>
INLINE void mix_columns(const float* weights, int64_t from, int64_t to, const uint8_t* values, int64_t wide, float* out) {
    vf sum[R][V];
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) sum[r][v] = load(out + r * wide + v * LANES);
    }
    for (int64_t t = from; t < to; t++) {
        vf value[V];
        for (int v = 0; v < V; v++) value[v] = Cell::load(values + (t * wide + v * LANES) * Cell::bytes);
        for (int r = 0; r < R; r++) {
            const vf x = splat(weights[r * SCORES + t]);
            for (int v = 0; v < V; v++) sum[r][v] = fma(x, value[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) store(out + r * wide + v * LANES, sum[r][v]);
    }
}

template <class Cell, int R>
void mix(const float* weights, int64_t from, int64_t to, const uint8_t* values, int64_t wide, float* out) {
    int64_t d = 0;
    for (; d + QUERY_VECS * LANES <= wide; d += QUERY_VECS * LANES) {
        mix_columns<Cell, R, QUERY_VECS>(weights, from, to, values + d * Cell::bytes, wide, out + d);
    }
    for (; d < wide; d += LANES) mix_columns<Cell, R, 1>(weights, from, to, values + d * Cell::bytes, wide, out + d);
}

// By number of rows, less one.
template <class Cell>
struct Kernels {
    static constexpr decltype(&score<Cell, 1>) scores[QUERIES] = {score<Cell, 1>, score<Cell, 2>, score<Cell, 3>,
                                                               score<Cell, 4>, score<Cell, 5>, score<Cell, 6>};
    static constexpr decltype(&mix<Cell, 1>) mixes[QUERIES] = {mix<Cell, 1>, mix<Cell, 2>, mix<Cell, 3>,
                                                            mix<Cell, 4>, mix<Cell, 5>, mix<Cell, 6>};
};

INLINE int64_t whole_vectors_down(int64_t n) { return n / LANES * LANES; }
INLINE int64_t whole_vectors_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE int64_t between(int64_t low, int64_t n, int64_t high) { return n < low ? low : n > high ? high : n; }

// Columns of the page that begins at column `start` of the span, of those in [first, last) of the span.
struct Part {
    int64_t from, to;
    Part(int64_t first, int64_t last, int64_t start)
        : from(between(0, first - start, PAGE)), to(between(0, last - start, PAGE)) {}
};

// Scores of one page for all rows.
template <class Cell>
void score_page(const Queries& t, int64_t span, int64_t start, int64_t dim, const uint8_t* keys, float* scores) {
    for (int64_t r = 0; r < t.rows; r += QUERIES) {
        const int64_t rows = between(1, t.rows - r, QUERIES);
        const Part part(t.first(r, span), t.last(r + rows - 1, span), start);
        if (part.from >= part.to) continue;
        Kernels<Cell>::scores[rows - 1](t.q + r * dim, dim, keys, whole_vectors_down(part.from),
                                        whole_vectors_up(part.to), scores + r * SCORES + start);
    }
}

// Values of one page, weighted, for all rows: those that every row of a register tile sees at once, others row by row.
template <class Cell>
void mix_page(const Queries& t, int64_t span, int64_t start, int64_t wide, const uint8_t* values, const float* weights,
              float* out) {
    for (int64_t r = 0; r < t.rows; r += QUERIES) {
        const int64_t rows = between(1, t.rows - r, QUERIES), end = r + rows - 1;
        const Part any(t.first(r, span), t.last(end, span), start);
        if (any.from >= any.to) continue;
        const Part all(t.first(end, span), t.last(r, span), start);
        const auto row_by_row = [&](int64_t from, int64_t to) {
            for (int64_t i = r; i <= end; i++) {
                const Part own(t.first(i, span), t.last(i, span), start);
                const int64_t first = between(from, own.from, to), last = between(from, own.to, to);
                if (first >= last) continue;
                Kernels<Cell>::mixes[0](weights + i * SCORES + start, first, last, values, wide, out + i * wide);
            }
        };
        if (all.from >= all.to) {
            row_by_row(any.from, any.to);
            continue;
        }
        if (any.from < all.from) row_by_row(any.from, all.from);
        Kernels<Cell>::mixes[rows - 1](weights + r * SCORES + start, all.from, all.to, values, wide, out + r * wide);
        if (all.to < any.to) row_by_row(all.to, any.to);
    }
}

template <class Cell>
void widen(const uint8_t* cells, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += LANES) store(out + i, Cell::load(cells + i * Cell::bytes));
}

// Scores in columns [first, last) become weights exp(score - peak), for scaled cells times the scales of the values.
template <bool SCALED>
INLINE Seen soften(float* scores, int64_t first, int64_t last, const float* key_scales, const float* value_scales) {
    const float nothing = -__builtin_inff();
    const int64_t from = whole_vectors_down(first), to = whole_vectors_up(last);
    if (SCALED) {
        for (int64_t c = from; c < to; c += LANES) store(scores + c, load(scores + c) * load(key_scales + c));
    }
    for (int64_t c = from; c < first; c++) scores[c] = nothing;
    for (int64_t c = last; c < to; c++) scores[c] = nothing;
    vf most = splat(nothing), sum = {};
    for (int64_t c = from; c < to; c += LANES) most = max(most, load(scores + c));
    const float peak = greatest(most);
    for (int64_t c = from; c < to; c += LANES) {
        const vf x = load(scores + c);
        vf weight = (vf)((vi)exp(x - splat(peak)) & ~(vi)(x == splat(nothing)));
        sum = sum + weight;
        if (SCALED) weight = weight * load(value_scales + c);
        store(scores + c, weight);
    }
    return {peak, sum4(sum, vf{}, vf{}, vf{})[0]};
}

INLINE float exp_of(float x) { return exp(splat(x))[0]; }

// Folds what rows saw of a later span into what they saw before.
void fold(const Result& before, const Result& later, int64_t rows, int64_t wide) {
    for (int64_t r = 0; r < rows; r++) {
        Seen& seen = before.seen[r];
        const Seen& more = later.seen[r];
        float* out = before.out + r * wide;
        const float* part = later.out + r * wide;
        if (more.total == 0) continue;
        if (seen.total == 0) {
            seen = more;
            memcpy(out, part, (size_t)wide * sizeof(float));
            continue;
        }
        const float peak = seen.peak > more.peak ? seen.peak : more.peak;
        const float a = exp_of(seen.peak - peak), b = exp_of(more.peak - peak);
        seen = {peak, seen.total * a + more.total * b};
        for (int64_t d = 0; d < wide; d += LANES) {
            store(out + d, fma(load(part + d), splat(b), load(out + d) * splat(a)));
        }
    }
}

// What all rows of a tile see of one span.
template <class Cell>
void attend_span(const Queries& t, const Layout& l, int64_t span, const Bench& bench, const Result& result) {
    const int64_t first = t.first(0, span), last = t.last(t.rows - 1, span);
    const int64_t first_page = first / PAGE * PAGE, page0 = span * (SPAN / PAGE);
    const bool direct = t.rows <= DIRECT_ROWS || Cell::bytes == sizeof(float);
    for (int64_t start = first_page; start < last; start += PAGE) {
        const uint8_t* keys = t.page(page0 + start / PAGE);
        if (Cell::scaled) {
            memcpy(bench.scales + start, keys + l.scales, PAGE * sizeof(float));
            memcpy(bench.scales + SPAN + start, keys + l.scales + PAGE * sizeof(float), PAGE * sizeof(float));
        }
        if (direct) {
            score_page<Cell>(t, span, start, l.dim, keys, bench.scores);
        } else {
            widen<Cell>(keys, PAGE * l.dim, bench.page);
            score_page<CellF32>(t, span, start, l.dim, (const uint8_t*)bench.page, bench.scores);
        }
    }
    for (int64_t r = 0; r < t.rows; r++) {
        const int64_t from = t.first(r, span), to = t.last(r, span);
        result.seen[r] = from < to ? soften<Cell::scaled>(bench.scores + r * SCORES, from, to, bench.scales,
                                                          bench.scales + SPAN)
                                   : Seen{0, 0};
    }
    memset(result.out, 0, (size_t)(t.rows * l.wide) * sizeof(float));
    for (int64_t start = first_page; start < last; start += PAGE) {
        const uint8_t* values = t.page(page0 + start / PAGE) + l.values;
        if (direct) {
            mix_page<Cell>(t, span, start, l.wide, values, bench.scores, result.out);
        } else {
            const Part part(first, last, start);
            widen<Cell>(values + part.from * l.wide * Cell::bytes, (part.to - part.from) * l.wide,
                        bench.page + part.from * l.wide);
            mix_page<CellF32>(t, span, start, l.wide, (const uint8_t*)bench.page, bench.scores, result.out);
        }
    }
}

}  // namespace
