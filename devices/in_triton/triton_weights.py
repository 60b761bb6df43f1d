"""What the bytes of quantised weights mean, for Triton: how a kernel walks through bands and multiplies what is there.

A matrix is read as it lies on the host, in bands (`kernels.band_layout`). Sixteen rows of a band have their pieces of
four bytes side by side, so a thread reads 16 bytes, the same piece of four rows, and four threads 64 bytes. Columns are
taken in groups of 64; a thread has all pieces of a group, so what it works out about a scale serves 32 to 64 columns.

A number q of B bits is moved into the fraction of a float, where it reads 1 + q / 2^B (or 2^(B + 4)) without being
converted: a shift for two numbers and an instruction for each, and one to multiply. With one row of inputs (`MANY` is
false) a sum of (1 + q / 2^B) x is put right once per scale, with the sum of its x. With many, weights become float16
for tensor cores.

Layouts of the types: ggml's block definitions, as documented by `gguf.quants`; tested against `kernels.reference`.
"""

import triton
import triton.language as tl

from shoal.kernels.reference import IQ4_NL_VALUES

GROUP = 64
ONE = 0x3F800000  # the bits of 1.0
SUMS = tl.constexpr(4)  # of 16 inputs each, of a group


def _packed(values: tuple[int, ...]) -> tl.constexpr:
    """Four values, with 128 added, as the bytes of a number."""
    return tl.constexpr(sum(value + 128 << 8 * place for place, value in enumerate(values)))


_NL_0, _NL_1, _NL_2, _NL_3 = (_packed(IQ4_NL_VALUES[start : start + 4]) for start in (0, 4, 8, 12))


@triton.jit
def _moved(word, BIT: tl.constexpr, TO: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bits at BIT of a word, at TO; the other bits are 0."""
    if BIT < TO:
        there = word << (TO - BIT)
    else:
        there = word >> (BIT - TO)
    return there & (((1 << WIDTH) - 1) << TO)


@triton.jit
def _fraction(
    word,
    more,
    one,
    I: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    NL: tl.constexpr,
):
    """1 + q / 2^BITS, q the weight of byte I of each word: its high nibble (HALF is 1), its low one, or all of it
    (BITS is 8). Of the low nibble it is 1 + q / 2^(BITS + 4), so both come with one shift. Higher bits of q are at
    STEP * I of `more`. NL: the nibble numbers a value of IQ4_NL. `one`: the bits of 1.0."""
    if NL:
        q = _moved(word, 8 * I + 4 * HALF, 0, 4)
        low = tl.where((q & 4) == 0, _NL_0, _NL_1)
        high = tl.where((q & 4) == 0, _NL_2, _NL_3)
        values = tl.where((q & 8) == 0, low, high).to(tl.uint32)
        bits = ((values >> (8 * (q & 3))) & 255) << 15
    elif BITS == 8:
        bits = _moved(word, 8 * I, 15, 8)
    else:
        bits = _moved(word, 8 * I + 4 * HALF, 19 - BITS + 4 * HALF, 4)
        if BITS > 4:
            bits |= _moved(more, STEP * I, 23 - BITS + 4 * HALF, BITS - 4)
    return (bits | one).to(tl.float32, bitcast=True)


@triton.jit
def _four(
    acc,
    word,
    more,
    one,
    scale,
    low,
    x,
    g,
    E,
    t,
    T,
    COLS: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    NL: tl.constexpr,
    MANY: tl.constexpr,
):
    """Adds the products of four columns of each group, E and those behind it: to (groups, rows) without scales, or
    with MANY to (inputs, rows) with them."""
    for i in tl.static_range(4):
        f = _fraction(word, more, one, i, HALF, BITS, STEP, NL)
        at = (E + i) * (COLS // 64) + g
        if MANY:
            inputs = tl.load(x + t[:, None] * COLS + at[None, :], mask=(t < T)[:, None], other=0.0)
            acc = tl.dot(inputs, (f * scale + low).to(tl.float16), acc)
        else:
            acc += f * tl.load(x + at)[:, None]
    return acc


@triton.jit
def _settled(total, acc, scale, low, sums, g, S, N: tl.constexpr, COLS: tl.constexpr):
    """Adds what N * 16 columns give, their sums of x beginning with number S of a group."""
    x = tl.load(sums + S * (COLS // 64) + g)
    if N == 2:
        x += tl.load(sums + (S + 1) * (COLS // 64) + g)
    return total + acc * scale + x[:, None] * low


@triton.jit
def _blocks_of_32(
    total, w, x, sums, one, band, r, g, live, t, T, COLS: tl.constexpr, KIND: tl.constexpr, MANY: tl.constexpr
):
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL: two blocks make a group; of nibbles, the low ones are its first half."""
    NL: tl.constexpr = KIND == "IQ4_NL"
    FIVE: tl.constexpr = KIND == "Q5_0" or KIND == "Q5_1"
    WITH_LOW: tl.constexpr = KIND == "Q4_1" or KIND == "Q5_1"
    EIGHT: tl.constexpr = KIND == "Q8_0"
    BITS: tl.constexpr = 8 if EIGHT or NL else (5 if FIVE else 4)
    ZERO: tl.constexpr = 128 if EIGHT or NL else (16 if FIVE else 8)
    HALVES: tl.constexpr = 16 if WITH_LOW else 8  # words that they take
    QS: tl.constexpr = HALVES + (16 if FIVE else 0)
    PIECES: tl.constexpr = 8 if EIGHT else 4
    WORDS: tl.constexpr = QS + 16 * PIECES  # of a block of 16 rows
    words, halves = w.to(tl.pointer_type(tl.uint32)), w.to(tl.pointer_type(tl.float16))
    for b in tl.range(0, 2, loop_unroll_factor=1 if MANY else 2):
        at = band[None, :] * (COLS // 32 * WORDS) + (2 * g + b)[:, None] * WORDS
        d = tl.load(halves + 2 * at + r[None, :]).to(tl.float32)
        if WITH_LOW:
            low = tl.load(halves + 2 * at + 16 + r[None, :]).to(tl.float32)
        else:
            low = -ZERO * d
        if MANY:
            d, low = tl.where(live[:, None], d, 0.0), tl.where(live[:, None], low, 0.0)
        scale_0 = d * (1 << (8 if BITS == 8 else BITS + 4))
        scale_1 = d * (1 << BITS)
        low_0, low_1 = low - scale_0, low - scale_1
        at += r[None, :]
        fifth = tl.load(words + at + HALVES) if FIVE else d
        acc_0 = total if MANY else tl.zeros_like(total)
        acc_1 = acc_0
        for p in tl.range(0, PIECES, loop_unroll_factor=1 if MANY else PIECES):
            word = tl.load(words + at + QS + 16 * p)
            e = 32 * b + 4 * p
            if EIGHT:
                word ^= 0x80808080
            more = fifth >> 4 * p if FIVE else word
            acc_0 = _four(acc_0, word, more, one, scale_0, low_0, x, g, e, t, T, COLS, 0, BITS, 1, NL, MANY)
            if not EIGHT:
                more = more >> 16 if FIVE else word
                e += 16
                if MANY:
                    acc_0 = _four(
                        acc_0, word, more, one, scale_1, low_1, x, g, e, t, T, COLS, 1, BITS, 1, NL, MANY
                    )
                else:
                    acc_1 = _four(
                        acc_1, word, more, one, scale_1, low_1, x, g, e, t, T, COLS, 1, BITS, 1, NL, MANY
                    )
        if MANY:
            total = acc_0
        elif EIGHT:
            total = _settled(total, acc_0, scale_0, low_0, sums, g, 2 * b, 2, COLS)
        else:
            total = _settled(total, acc_0, scale_0, low_0, sums, g, 2 * b, 1, COLS)
            total = _settled(total, acc_1, scale_1, low_1, sums, g, 2 * b + 1, 1, COLS)
    return total


@triton.jit
def _six_bits(packed, top, first, SHIFT: tl.constexpr):
    """Scales (SHIFT is 0) or minima (4) of Q4_K and Q5_K, float32; `first`: of the first half of a block."""
    return tl.where(first, packed & 63, ((top >> SHIFT) & 15) | ((packed >> 2) & 48)).to(tl.float32)


@triton.jit
def _q45_k(
    total, w, x, sums, one, band, r, g, live, t, T, COLS: tl.constexpr, KIND: tl.constexpr, MANY: tl.constexpr
):
    """Q4_K and Q5_K: a block is four groups, the two halves of each have a scale and a minimum."""
    FIVE: tl.constexpr = KIND == "Q5_K"
    BITS: tl.constexpr = 5 if FIVE else 4
    QS: tl.constexpr = (
        192 if FIVE else 64
    )  # behind two halves, three pieces of scales and eight of fifth bits
    WORDS: tl.constexpr = QS + 512
    words, halves = w.to(tl.pointer_type(tl.uint32)), w.to(tl.pointer_type(tl.float16))
    at = band[None, :] * (COLS // 256 * WORDS) + (g // 4)[:, None] * WORDS
    d = tl.load(halves + 2 * at + r[None, :]).to(tl.float32)
    least = tl.load(halves + 2 * at + 16 + r[None, :]).to(tl.float32)
    if MANY:
        d, least = tl.where(live[:, None], d, 0.0), tl.where(live[:, None], least, 0.0)
    at += r[None, :]
    c = (g % 4)[:, None]
    first, shift = c < 2, 16 * (c % 2)
    a = tl.load(words + at + 16) >> shift
    m = tl.load(words + at + 32) >> shift
    top = tl.load(words + at + 48) >> shift
    scale_0 = d * (_six_bits(a, top, first, 0) * (1 << (BITS + 4)))
    low_0 = -scale_0 - least * _six_bits(m, top, first, 4)
    a, m, top = a >> 8, m >> 8, top >> 8
    scale_1 = d * (_six_bits(a, top, first, 0) * (1 << BITS))
    low_1 = -scale_1 - least * _six_bits(m, top, first, 4)
    acc_0 = total if MANY else tl.zeros_like(total)
    acc_1 = acc_0
    for p in tl.range(0, 8, loop_unroll_factor=1 if MANY else 8):
        word = tl.load(words + at + QS + 128 * c + 16 * p)
        more = tl.load(words + at + 64 + 16 * p) >> 2 * c if FIVE else word
        e = 4 * p
        acc_0 = _four(acc_0, word, more, one, scale_0, low_0, x, g, e, t, T, COLS, 0, BITS, 8, False, MANY)
        more = more >> 1 if FIVE else word
        e += 32
        if MANY:
            acc_0 = _four(
                acc_0, word, more, one, scale_1, low_1, x, g, e, t, T, COLS, 1, BITS, 8, False, MANY
            )
        else:
            acc_1 = _four(
                acc_1, word, more, one, scale_1, low_1, x, g, e, t, T, COLS, 1, BITS, 8, False, MANY
            )
    if MANY:
        total = acc_0
    else:
        total = _settled(total, acc_0, scale_0, low_0, sums, g, 0, 2, COLS)
        total = _settled(total, acc_1, scale_1, low_1, sums, g, 2, 2, COLS)
    return total


@triton.jit
def _q6_k(total, w, x, sums, one, band, r, g, live, t, T, COLS: tl.constexpr, MANY: tl.constexpr):
    """Q6_K: `g` counts pairs of groups, which share their words; each 16 columns have a scale."""
    WORDS: tl.constexpr = 840
    words, halves = w.to(tl.pointer_type(tl.uint32)), w.to(tl.pointer_type(tl.float16))
    at = band[None, :] * (COLS // 256 * WORDS) + (g // 2)[:, None] * WORDS
    d = tl.load(halves + 2 * at + 2 * 832 + r[None, :]).to(tl.float32)
    if MANY:
        d = tl.where(live[:, None], d, 0.0)
    n = (g % 2)[:, None]
    at += r[None, :]
    scales_0 = tl.load(words + at + 768 + 32 * n)
    scales_1 = tl.load(words + at + 784 + 32 * n)
    for j in range(4):  # not unrolled: all loads at once would need more registers than there are
        scale_0 = d * ((scales_0 << (24 - 8 * j)).to(tl.int32, bitcast=True) >> 24).to(tl.float32)
        scale_1 = d * ((scales_1 << (24 - 8 * j)).to(tl.int32, bitcast=True) >> 24).to(tl.float32)
        low_0, low_1 = -(1024.0 + 32.0) * scale_0, -(64.0 + 32.0) * scale_1
        scale_0, scale_1 = 1024.0 * scale_0, 64.0 * scale_1
        acc_0 = total if MANY else tl.zeros_like(total)
        acc_1 = acc_0
        for p in tl.range(0, 4, loop_unroll_factor=1 if MANY else 4):
            word = tl.load(words + at + 256 * n + 64 * j + 16 * p)
            more = tl.load(words + at + 512 + 128 * n + 64 * (j % 2) + 16 * p) >> 2 * (j // 2)
            e = 16 * j + 4 * p
            acc_0 = _four(
                acc_0, word, more, one, scale_0, low_0, x, 2 * g, e, t, T, COLS, 0, 6, 8, False, MANY
            )
            more = more >> 4
            if MANY:
                acc_0 = _four(
                    acc_0, word, more, one, scale_1, low_1, x, 2 * g + 1, e, t, T, COLS, 1, 6, 8, False, MANY
                )
            else:
                acc_1 = _four(
                    acc_1, word, more, one, scale_1, low_1, x, 2 * g + 1, e, t, T, COLS, 1, 6, 8, False, MANY
                )
        if MANY:
            total = acc_0
        else:
            total = _settled(total, acc_0, scale_0, low_0, sums, 2 * g, j, 1, COLS)
            total = _settled(total, acc_1, scale_1, low_1, sums, 2 * g + 1, j, 1, COLS)
    return total


@triton.jit
def products(
    total,
    w,
    x,
    sums,
    one,
    band,
    r,
    part,
    t,
    T,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    MANY: tl.constexpr,
):
    """Adds the products of rows `r` of bands `band` (each (rows,)) with inputs, over the columns of `part` of SPLIT, in
    steps of STEP groups: to (STEP, rows) with one row of inputs, which is to be summed; with MANY to (inputs, rows),
    inputs `t` of T. `x`, `sums`: as `arranged` lays them. `one`: ONE, which a compiler must not know: it would take
    two instructions where one does."""
    GROUPS: tl.constexpr = COLS // (128 if KIND == "Q6_K" else 64)
    EACH: tl.constexpr = (GROUPS + STEP * SPLIT - 1) // (STEP * SPLIT)
    WHOLE: tl.constexpr = GROUPS == EACH * STEP * SPLIT
    for step in range(EACH):
        g = (part * EACH + step) * STEP + tl.arange(0, STEP)
        live = g < GROUPS
        if not WHOLE:  # some are there twice, and do not count
            g = tl.minimum(g, GROUPS - 1)
        before = total
        if KIND == "Q4_K" or KIND == "Q5_K":
            total = _q45_k(total, w, x, sums, one, band, r, g, live, t, T, COLS, KIND, MANY)
        elif KIND == "Q6_K":
            total = _q6_k(total, w, x, sums, one, band, r, g, live, t, T, COLS, MANY)
        else:
            total = _blocks_of_32(total, w, x, sums, one, band, r, g, live, t, T, COLS, KIND, MANY)
        if not MANY and not WHOLE:
            total = tl.where(live[:, None], total, before)
    return total
