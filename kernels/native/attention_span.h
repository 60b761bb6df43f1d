// Attention of a tile of queries over one span of a sequence's keys and values, for some K/V heads.
//
// The contract of the whole: no bit of a query's result depends on what is computed beside it. So positions are cut
// into spans that begin at multiples of SPAN. Within a span every sum runs over dimensions, positions or fixed lanes in
// ascending order, and spans are folded in ascending order (online softmax, arXiv 1805.02867). It makes no difference
// which rows share a register tile, nor whether a page was widened to floats before.
//
// Keys and values are read once, so few rows are as fast as memory. The heads of a page lie one after the other and are
// read so, and while two blocks (a block is the keys or the values of one head in a page) are in use, the next two are
// fetched.
#pragma once
#include "ahead.h"
#include "cells.h"
#include "product.h"

namespace {

constexpr int64_t PAGE = 64;   // positions
constexpr int64_t SPAN = 256;  // positions; in a long context one new token is computed span by span
constexpr int64_t SCORES = SPAN + 16;  // rows are no power of two apart: they would compete for cache lines
constexpr int QUERIES = 6;        // queries that share each load of a key or value
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int QUERY_VECS = 4;  // 6 * 4 sums, 4 keys, 1 query of 32 registers
#else
constexpr int QUERY_VECS = 2;  // 6 * 2 sums, 2 keys, 1 query of 16 registers
#endif
constexpr int64_t DIRECT_ROWS = 2 * QUERIES;  // for more rows a page is widened to floats once

// Where things are in a page, in bytes from where the K/V head begins.
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

// Columns [first, last) of a span.
struct Columns {
    int32_t first, last;
};

// Queries of `heads` K/V heads: for each head `group` rows of `dim` numbers for each of consecutive positions.
struct Queries {
    const float* q;
    int64_t heads, head_floats;  // how far apart the queries of two heads are
    int64_t rows, group, position;
    int64_t window;
    const int32_t* pages;  // of the sequence
    const uint8_t* head;   // the first K/V head in page 0
    int64_t page_bytes;
    const uint8_t* after;  // what is read after all of this, or null

    const float* of_head(int64_t index) const { return q + index * head_floats; }
    const uint8_t* page(int64_t index) const { return head + pages[index] * page_bytes; }
    // The columns of a span that a row sees.
    void look(int64_t span, Columns* columns) const {
        int64_t end = position + 1 - span * SPAN;
        for (int64_t r = 0; r < rows; end++) {
            const int32_t first = window ? column(end - window) : 0, last = column(end);
            for (int64_t g = 0; g < group; g++) columns[r++] = {first, last};
        }
    }

private:
    static int32_t column(int64_t at) { return (int32_t)(at < 0 ? 0 : at > SPAN ? SPAN : at); }
};

// Of the spans that a row has seen so far: its greatest score, and the sum of its weights, 0 if it has seen nothing.
struct Seen {
    float peak, total;
};

// Results of rows over some spans: `out` (rows, wide) is not yet divided by the totals. Rows of a head come together.
struct Result {
    Seen* seen;
    float* out;
    static int64_t floats(int64_t rows, int64_t wide) { return rows * (wide + 2); }
    Result(float* memory, int64_t rows, int64_t wide)
        : seen(reinterpret_cast<Seen*>(memory + rows * wide)), out(memory) {}
};

// A thread's working memory, for `rows` rows and `heads` heads at most.
struct Bench {
    float *scores, *page, *scales;
    Result part, all;
    Columns* columns;
    static int64_t floats(int64_t rows, int64_t heads, int64_t wide) {
        return rows * (SCORES + 2) + PAGE * wide + heads * 2 * SPAN + 2 * Result::floats(rows, wide);
    }
    Bench(float* memory, int64_t rows, int64_t heads, int64_t wide)
        : scores(memory),
          page(scores + rows * SCORES),
          scales(page + PAGE * wide),
          part(scales + heads * 2 * SPAN, rows, wide),
          all(part.out + Result::floats(rows, wide), rows, wide),
          columns(reinterpret_cast<Columns*>(all.out + Result::floats(rows, wide))) {}
};

// scores (R, SCORES) of R queries and V vectors of keys of a page. Pages may be widened to floats: what is fetched
// meanwhile is as it is stored.
template <class Cell, class Stored, int R, int V>
INLINE void score_columns(const float* q, int64_t dim, const uint8_t* keys, Ahead& ahead, float* scores) {
    vf sum[R][V] = {};
    fetching<V * LANES * Stored::bytes>(ahead, 0, dim, [&](int64_t d) INLINE_LAMBDA {
        vf key[V];
        load_cells<Cell, V>(keys + d * PAGE * Cell::bytes, key);
        for (int r = 0; r < R; r++) {
            const vf x = splat(q[r * dim + d]);
            for (int v = 0; v < V; v++) sum[r][v] = fma(x, key[v], sum[r][v]);
        }
    });
    for (int r = 0; r < R; r++) {
        ordered<Cell, V>(sum[r]);
        for (int v = 0; v < V; v++) store(scores + r * SCORES + v * LANES, sum[r][v]);
    }
}

// Columns [from, to) of a page, whole vectors.
template <class Cell, class Stored, int R>
void score(const float* q, int64_t dim, const uint8_t* keys, int64_t from, int64_t to, Ahead ahead, float* scores) {
    for (; from + QUERY_VECS * LANES <= to; from += QUERY_VECS * LANES) {
        score_columns<Cell, Stored, R, QUERY_VECS>(q, dim, keys + from * Cell::bytes, ahead, scores + from);
    }
    for (; from < to; from += LANES) {
        score_columns<Cell, Stored, R, 1>(q, dim, keys + from * Cell::bytes, ahead, scores + from);
    }
}

// out (R, wide) += weights (R, SCORES) @ values, for V vectors of the values of positions [from, to) of a page. Vectors
// of `out` are in the order of those of values until `order_rows`.
template <class Cell, class Stored, int R, int V>
INLINE void mix_columns(const float* weights, int64_t from, int64_t to, const uint8_t* values, Ahead& ahead,
                        int64_t wide, float* out) {
    vf sum[R][V];
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) sum[r][v] = load(out + r * wide + v * LANES);
    }
    fetching<V * LANES * Stored::bytes>(ahead, from, to, [&](int64_t t) INLINE_LAMBDA {
        vf value[V];
        load_cells<Cell, V>(values + t * wide * Cell::bytes, value);
        for (int r = 0; r < R; r++) {
            const vf x = splat(weights[r * SCORES + t]);
            for (int v = 0; v < V; v++) sum[r][v] = fma(x, value[v], sum[r][v]);
        }
    });
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) store(out + r * wide + v * LANES, sum[r][v]);
    }
}

template <class Cell, class Stored, int R>
void mix(const float* weights, int64_t from, int64_t to, const uint8_t* values, int64_t wide, Ahead ahead, float* out) {
    int64_t d = 0;
    for (; d + QUERY_VECS * LANES <= wide; d += QUERY_VECS * LANES) {
        mix_columns<Cell, Stored, R, QUERY_VECS>(weights, from, to, values + d * Cell::bytes, ahead, wide, out + d);
    }
    for (; d < wide; d += LANES) {
        mix_columns<Cell, Stored, R, 1>(weights, from, to, values + d * Cell::bytes, ahead, wide, out + d);
    }
}

// Puts the sums of `rows` rows of mixed values into the order of cells.
template <class Cell>
void order_rows(int64_t rows, int64_t wide, float* out) {
    if (Cell::in_order) return;
    for (int64_t r = 0; r < rows; r++, out += wide) {
        for (int64_t d = 0; d + QUERY_VECS * LANES <= wide; d += QUERY_VECS * LANES) {
            vf sum[QUERY_VECS];
            for (int v = 0; v < QUERY_VECS; v++) sum[v] = load(out + d + v * LANES);
            ordered<Cell, QUERY_VECS>(sum);
            for (int v = 0; v < QUERY_VECS; v++) store(out + d + v * LANES, sum[v]);
        }
    }
}

// Indexed by the number of rows minus one.
template <class Cell, class Stored>
struct Kernels {
    static constexpr decltype(&score<Cell, Stored, 1>) scores[QUERIES] = {
        score<Cell, Stored, 1>, score<Cell, Stored, 2>, score<Cell, Stored, 3>,
        score<Cell, Stored, 4>, score<Cell, Stored, 5>, score<Cell, Stored, 6>};
    static constexpr decltype(&mix<Cell, Stored, 1>) mixes[QUERIES] = {
        mix<Cell, Stored, 1>, mix<Cell, Stored, 2>, mix<Cell, Stored, 3>,
        mix<Cell, Stored, 4>, mix<Cell, Stored, 5>, mix<Cell, Stored, 6>};
};

INLINE int64_t whole_vectors_down(int64_t n) { return n / LANES * LANES; }
INLINE int64_t whole_vectors_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE int64_t between(int64_t low, int64_t n, int64_t high) { return n < low ? low : n > high ? high : n; }

// The columns [first, last) of the span as far as they lie in the page that begins at column `start` of the span.
struct Part {
    int64_t from, to;
    Part(int64_t first, int64_t last, int64_t start)
        : from(between(0, first - start, PAGE)), to(between(0, last - start, PAGE)) {}
    bool none() const { return from >= to; }
};

// The scores of all rows of a head in one page.
template <class Cell, class Stored>
void score_page(const float* q, int64_t all_rows, const Columns* seen, int64_t start, int64_t dim, const uint8_t* keys,
                const Ahead& ahead, float* scores) {
    for (int64_t r = 0; r < all_rows; r += QUERIES) {
        const int64_t rows = least(all_rows - r, (int64_t)QUERIES);
        const Part part(seen[r].first, seen[r + rows - 1].last, start);
        if (part.none()) continue;
        Kernels<Cell, Stored>::scores[rows - 1](q + r * dim, dim, keys, whole_vectors_down(part.from),
                                                whole_vectors_up(part.to), r == 0 ? ahead : Ahead{},
                                                scores + r * SCORES + start);
    }
}

// Adds the weighted values of one page for all rows of a head: together for positions that every row of a register tile sees, row
// by row for the others.
template <class Cell, class Stored>
void mix_page(int64_t all_rows, const Columns* seen, int64_t start, int64_t wide, const uint8_t* values,
              const Ahead& ahead, const float* weights, float* out) {
    for (int64_t r = 0; r < all_rows; r += QUERIES) {
        const int64_t rows = least(all_rows - r, (int64_t)QUERIES), end = r + rows - 1;
        const Part any(seen[r].first, seen[end].last, start);
        if (any.none()) continue;
        const auto row_by_row = [&](int64_t from, int64_t to) {
            for (int64_t i = r; i <= end; i++) {
                const Part own(seen[i].first, seen[i].last, start);
                const int64_t first = most(from, own.from), last = least(own.to, to);
                if (first >= last) continue;
                Kernels<Cell, Stored>::mixes[0](weights + i * SCORES + start, first, last, values, wide, Ahead{},
                                                out + i * wide);
            }
        };
        const Part all(seen[end].first, seen[r].last, start);
        if (all.none()) {
            row_by_row(any.from, any.to);
            continue;
        }
        if (any.from < all.from) row_by_row(any.from, all.from);
        Kernels<Cell, Stored>::mixes[rows - 1](weights + r * SCORES + start, all.from, all.to, values, wide,
                                               r == 0 ? ahead : Ahead{}, out + r * wide);
        if (all.to < any.to) row_by_row(all.to, any.to);
    }
}

template <class Cell>
void widen(const uint8_t* cells, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += LANES) store(out + i, Cell::load(cells + i * Cell::bytes));
}

// 2^x for x <= 0, within 2 units in the last place, but at least 2^-126; NaN stays NaN. The polynomial is the best of
// its degree on [-1/2, 1/2]. Adding `shift` rounds x and leaves its exponent, biased, in the lowest bits.
INLINE vf power_of_two(vf x) {
    const vf shift = splat(0x1.8p23f + 127);
    x = max(splat(-126.0f), x);  // in this order a NaN stays one
    const vf shifted = x + shift, r = x - (shifted - shift);
    vf p = splat(1.327647217e-3f);
    p = fma(p, r, splat(9.675541331e-3f));
    p = fma(p, r, splat(5.550713273e-2f));
    p = fma(p, r, splat(2.402211972e-1f));
    p = fma(p, r, splat(6.931469671e-1f));
    p = fma(p, r, splat(1.000000072f));
    return p * bits_to_float((vi)shifted << 23);
}

// Turns scores in columns [first, last) into weights 2^(score - peak), for scaled cells times the scales of the values.
template <bool SCALED>
INLINE Seen soften(float* scores, int64_t first, int64_t last, const float* key_scales, const float* value_scales) {
    const float nothing = -__builtin_inff();
    const int64_t from = whole_vectors_down(first), to = whole_vectors_up(last);
    if (SCALED) {
        for (int64_t c = from; c < to; c += LANES) store(scores + c, load(scores + c) * load(key_scales + c));
    }
    for (int64_t c = from; c < first; c++) scores[c] = nothing;
    for (int64_t c = last; c < to; c++) scores[c] = nothing;
    vf most = splat(nothing), other = most, sum = {};
    int64_t at = from;
    for (; at + 2 * LANES <= to; at += 2 * LANES) {
        most = max(most, load(scores + at));
        other = max(other, load(scores + at + LANES));
    }
    if (at < to) most = max(most, load(scores + at));
    const float peak = greatest(max(most, other));
    for (int64_t c = from; c < to; c += LANES) {
        vf weight = power_of_two(load(scores + c) - splat(peak));
        sum = sum + weight;
        if (SCALED) weight = weight * load(value_scales + c);
        store(scores + c, weight);
    }
    return {peak, sum4(sum, vf{}, vf{}, vf{})[0]};
}

INLINE float power_of_two(float x) { return power_of_two(splat(x))[0]; }

// Folds the results of a later span into those so far.
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
        const float a = power_of_two(seen.peak - peak), b = power_of_two(more.peak - peak);
        seen = {peak, seen.total * a + more.total * b};
        for (int64_t d = 0; d < wide; d += LANES) {
            store(out + d, fma(load(part + d), splat(b), load(out + d) * splat(a)));
        }
    }
}

// The results of all rows of all heads over one span.
template <class Cell>
void attend_span(const Queries& q, const Layout& l, int64_t span, const Bench& bench, const Result& result) {
    Columns* columns = bench.columns;
    q.look(span, columns);
    const int64_t first = columns[0].first, last = columns[q.rows - 1].last, rows = q.rows;
    const int64_t first_page = first / PAGE * PAGE, page0 = span * (SPAN / PAGE);
    const auto block = [&](int64_t start, int64_t head, int64_t at) {
        return q.page(page0 + start / PAGE) + head * l.head_bytes + at;
    };
    const int64_t blocks = ceil_div(last - first_page, PAGE) * q.heads;
    const int64_t end = q.position + rows / q.group - span * SPAN;  // of all that is seen, in later spans, too
    // All blocks in the order in which they are read: keys, values and the first ones after these, or null.
    const auto nth = [&](int64_t i) -> const uint8_t* {
        const int64_t head = i % blocks % q.heads, start = i % blocks / q.heads * PAGE;
        if (i < 2 * blocks) return block(first_page + start, head, i < blocks ? 0 : l.values);
        if (end > SPAN) return SPAN + start < end ? block(SPAN + start, head, 0) : nullptr;
        return q.after && start == 0 ? q.after + head * l.head_bytes : nullptr;
    };
    // While two blocks are in use, the next two are fetched.
    const auto after = [&](int64_t i, int64_t bytes) {
        const int64_t first = (i / 2 + 1) * 2;
        return Ahead(nth(first), nth(first + 1), bytes, i % 2);
    };
    int64_t number = 0;
    const bool direct = rows <= DIRECT_ROWS || Cell::bytes == sizeof(float);
    const int64_t key_bytes = PAGE * Cell::bytes, value_bytes = l.wide * Cell::bytes;
    for (int64_t start = first_page; start < last; start += PAGE) {
        for (int64_t h = 0; h < q.heads; h++) {
            const uint8_t* keys = block(start, h, 0);
            float *scores = bench.scores + h * rows * SCORES, *scales = bench.scales + h * 2 * SPAN + start;
            if (Cell::scaled) {
                if (number + 2 < blocks) fetch(nth(number + 2) + l.scales, 2 * PAGE * sizeof(float));
                memcpy(scales, keys + l.scales, PAGE * sizeof(float));
                memcpy(scales + SPAN, keys + l.scales + PAGE * sizeof(float), PAGE * sizeof(float));
            }
            const Ahead ahead = after(number++, l.dim * key_bytes);
            if (direct) {
                score_page<Cell, Cell>(q.of_head(h), rows, columns, start, l.dim, keys, ahead, scores);
            } else {
                widen<Cell>(keys, PAGE * l.dim, bench.page);
                const uint8_t* floats = (const uint8_t*)bench.page;
                score_page<CellF32, Cell>(q.of_head(h), rows, columns, start, l.dim, floats, ahead, scores);
            }
        }
    }
    for (int64_t r = 0; r < q.heads * rows; r++) {
        const Columns c = columns[r % rows];
        const float* scales = bench.scales + r / rows * 2 * SPAN;
        result.seen[r] = c.first < c.last ? soften<Cell::scaled>(bench.scores + r * SCORES, c.first, c.last, scales, scales + SPAN)
                                          : Seen{0, 0};
    }
    memset(result.out, 0, (size_t)(q.heads * rows * l.wide) * sizeof(float));
    for (int64_t start = first_page; start < last; start += PAGE) {
        for (int64_t h = 0; h < q.heads; h++) {
            const uint8_t* values = block(start, h, l.values);
            const float* weights = bench.scores + h * rows * SCORES;
            float* out = result.out + h * rows * l.wide;
            const Ahead ahead = after(number++, PAGE * value_bytes);
            if (direct) {
                mix_page<Cell, Cell>(rows, columns, start, l.wide, values, ahead, weights, out);
            } else {
                const Part part(first, last, start);
                widen<Cell>(values + part.from * value_bytes, (part.to - part.from) * l.wide, bench.page + part.from * l.wide);
                mix_page<CellF32, Cell>(rows, columns, start, l.wide, (const uint8_t*)bench.page, ahead, weights, out);
            }
        }
    }
    if (direct) order_rows<Cell>(q.heads * rows, l.wide, result.out);
}

}  // namespace
