"""Triton kernels of attention for texts that have one row in a step, as answers do: what they add is stored, and they
look at all that they have, page by page, wherever that lies.

What bounds them is the device's memory: K and V are read once for all heads that share them, as they are stored, and
long texts in parts beside each other, which are joined afterwards (Flash-Decoding: crfm.stanford.edu/2023/10/12). Texts
with more rows are left out, and of shorter ones the parts that they do not have. Layouts: `KvLayout`; a table's row
says of a text where its row is, how many there are, at which position, and where its pages begin.
"""

import triton
import triton.language as tl

IN_PAGE = tl.constexpr(64)  # positions
SMALLEST = tl.constexpr(1e-30)  # a scaled type stores smaller numbers as zeros, if a head has no larger one
# 1.5 * 2^23: added and taken away, it leaves whole numbers, even ones for halves.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def _turned(
    x,
    norm,
    cos,
    sin,
    row,
    d,
    eps,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """A head's numbers, normed if NORMED, of which DIMS are rotated."""
    its = tl.load(x + d, mask=d < DIM, other=0.0)
    factor = 1.0
    if NORMED:
        factor = 1.0 / tl.sqrt(tl.sum(its * its, 0) / DIM + eps)
        its = its * factor * tl.load(norm + d, mask=d < DIM, other=0.0)
    if DIMS > 0:
        if INTERLEAVED:
            first = d % 2 == 0
            other = tl.where(first, d + 1, d - 1)
            angle = d // 2
        else:
            first = d < DIMS // 2
            other = tl.where(first, d + DIMS // 2, d - DIMS // 2)
            angle = tl.where(first, d, d - DIMS // 2)
        turning = d < DIMS
        theirs = tl.load(x + other, mask=turning, other=0.0)
        if NORMED:
            theirs = theirs * factor * tl.load(norm + other, mask=turning, other=0.0)
        place = row * (DIMS // 2) + angle
        c = tl.load(cos + place, mask=turning, other=1.0)
        s = tl.load(sin + place, mask=turning, other=0.0)
        its = its * c + tl.where(first, -theirs, theirs) * s
    return its


@triton.jit
def stored(
    q,
    k,
    v,
    norm_q,
    norm_k,
    cos,
    sin,
    table,
    pages,
    numbers,
    scales,
    turned,
    eps,
    page_step,
    scales_step,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    ROOM: tl.constexpr,
    DIMS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
    SCALED: tl.constexpr,
    HEAD_STEP: tl.constexpr,
    SCALES_HEAD_STEP: tl.constexpr,
):
    """Program (text, which): a head of q, into `turned` (texts, HEADS, DIM); or one of k, or of v, into its page.
    `numbers`: of the type in which K and V are stored, with steps from page to page and from head to head; so `scales`.
    ROOM: a power of 2, at least WIDE."""
    text = tl.program_id(0)
    which = tl.program_id(1)
    if tl.load(table + 4 * text + 1) == 1:
        row = tl.load(table + 4 * text).to(tl.int64)
        start = tl.load(table + 4 * text + 2)
        d = tl.arange(0, ROOM)
        if which < HEADS:
            asked = q + (row * HEADS + which) * DIM
            its = _turned(asked, norm_q, cos, sin, row, d, eps, DIM, DIMS, INTERLEAVED, NORMED)
            tl.store(turned + (text * HEADS + which) * DIM + d, its, mask=d < DIM)
        else:
            page = tl.load(pages + tl.load(table + 4 * text + 3) + start // IN_PAGE).to(tl.int64)
            column = start % IN_PAGE
            values = which >= HEADS + KV_HEADS
            head = (which - HEADS) % KV_HEADS
            its = tl.zeros((ROOM,), tl.float32)
            if values:
                its = tl.load(v + (row * KV_HEADS + head) * DIM + d, mask=d < DIM, other=0.0)
            else:
                added = k + (row * KV_HEADS + head) * DIM
                its = _turned(added, norm_k, cos, sin, row, d, eps, DIM, DIMS, INTERLEAVED, NORMED)
            if SCALED:
                most = tl.max(tl.abs(its), 0)
                some = most >= SMALLEST
                # What is not finite leaves a scale that is no number.
                scale = tl.where(some, most / 127.0, 0.0) + tl.sum(its * 0.0, 0)
                place = page * scales_step + head * SCALES_HEAD_STEP + values.to(tl.int32) * IN_PAGE + column
                tl.store(scales + place, scale)
                whole = (its * tl.where(some, tl.div_rn(127.0, most), 0.0) + ROUNDING) - ROUNDING
                its = tl.where(whole == whole, whole, 0.0)
            at = page * page_step + head * HEAD_STEP
            kind = numbers.dtype.element_ty
            if values:
                tl.store(numbers + at + IN_PAGE * DIM + column * WIDE + d, its.to(kind), mask=d < WIDE)
            else:
                tl.store(numbers + at + d * IN_PAGE + column, its.to(kind), mask=d < DIM)


@triton.jit(do_not_specialize=["parts"])
def looked(
    turned,
    table,
    pages,
    numbers,
    scales,
    found,
    sums,
    largest,
    scale,
    page_step,
    scales_step,
    parts,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP_ROOM: tl.constexpr,
    SOME: tl.constexpr,
    EACH: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_STEP: tl.constexpr,
    SCALES_HEAD_STEP: tl.constexpr,
):
    """Program (part, head of K and V, text): EACH pages of a text, SOME tokens at a time. WHOLE: there is one part, and
    `found` is (T, HEADS, DIM), by the text's row; else (texts, HEADS, parts, DIM), to be divided by `sums`, where the
    largest score is `largest`, both (texts, HEADS, parts). WINDOW: 0 for none. GROUP_ROOM: a power of 2, with room for
    the heads of q that share one of K and V."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    text = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    start = tl.load(table + 4 * text + 2)
    if (tl.load(table + 4 * text + 1) == 1) & (part * EACH * IN_PAGE <= start):
        row = tl.load(table + 4 * text).to(tl.int64)
        its = pages + tl.load(table + 4 * text + 3)
        d = tl.arange(0, ROOM)
        g = tl.arange(0, GROUP_ROOM)
        mine = (g[:, None] < GROUP) & (d[None, :] < DIM)
        heads = head * GROUP + g
        q = tl.load(turned + (text * HEADS + heads[:, None]) * DIM + d[None, :], mask=mine, other=0.0) * scale
        seen_from = 0
        if WINDOW > 0:
            seen_from = tl.maximum(start - WINDOW + 1, 0)
        most = tl.full((GROUP_ROOM,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_ROOM,), tl.float32)
        mixed = tl.zeros((GROUP_ROOM, ROOM), tl.float32)
        for place in range(EACH):
            number = part * EACH + place
            # Of a page all is read, and what is not seen is left out afterwards.
            there = (number * IN_PAGE <= start) & ((number + 1) * IN_PAGE > seen_from)
            page = tl.load(its + number, mask=there, other=0).to(tl.int64)
            at = numbers + page * page_step + head * HEAD_STEP
            scales_at = scales + page * scales_step + head * SCALES_HEAD_STEP
            for column in range(0, IN_PAGE, SOME):
                t = column + tl.arange(0, SOME)
                position = number * IN_PAGE + t
                seen = (position <= start) & (position >= seen_from)
                whole = there & (d[:, None] < DIM)
                keys = tl.load(at + d[:, None] * IN_PAGE + t[None, :], mask=whole, other=0.0).to(tl.float32)
                scores = tl.sum(q[:, :, None] * keys[None, :, :], 1)
                if SCALED:
                    scores *= tl.load(scales_at + t, mask=there, other=0.0)[None, :]
                scores = tl.where(seen[None, :], scores, float("-inf"))
                now = tl.maximum(most, tl.max(scores, 1))
                against = tl.where(now == float("-inf"), 0.0, now)  # nothing was seen so far
                weights = tl.exp(scores - against[:, None])
                kept = tl.exp(most - against)
                total = total * kept + tl.sum(weights, 1)
                if SCALED:
                    factors = tl.load(scales_at + IN_PAGE + t, mask=there, other=0.0)
                    weights *= tl.where(seen, factors, 0.0)[None, :]
                below = at + IN_PAGE * DIM + t[:, None] * WIDE + d[None, :]
                whole = there & (d[None, :] < DIM)
                values = tl.load(below, mask=whole, other=0.0).to(tl.float32)
                values = tl.where(seen[:, None], values, 0.0)
                mixed = mixed * kept[:, None] + tl.sum(weights[:, :, None] * values[None, :, :], 1)
                most = now
        if WHOLE:
            to = (row * HEADS + heads[:, None]) * DIM + d[None, :]
            tl.store(found + to, mixed / total[:, None], mask=mine)
        else:
            to = (text * HEADS + heads).to(tl.int64) * parts + part
            tl.store(sums + to, total, mask=g < GROUP)
            tl.store(largest + to, most, mask=g < GROUP)
            tl.store(found + to[:, None] * DIM + d[None, :], mixed, mask=mine)


@triton.jit(do_not_specialize=["parts"])
def joined(
    found,
    sums,
    largest,
    table,
    out,
    parts,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROOM: tl.constexpr,
    EACH: tl.constexpr,
    SOME: tl.constexpr,
):
    """`out` (T, HEADS, DIM): what `looked` found in parts of EACH pages, SOME of them at a time. Program (head,
    text)."""
    head = tl.program_id(0)
    text = tl.program_id(1)
    if tl.load(table + 4 * text + 1) == 1:
        row = tl.load(table + 4 * text).to(tl.int64)
        d = tl.arange(0, ROOM)
        first = (text * HEADS + head).to(tl.int64) * parts
        mine = tl.load(table + 4 * text + 2) // (EACH * IN_PAGE) + 1
        most = tl.max(tl.full((SOME,), float("-inf"), tl.float32), 0)
        total = tl.sum(tl.zeros((SOME,), tl.float32), 0)
        mixed = tl.zeros((ROOM,), tl.float32)
        part = mine * 0
        while part < mine:
            i = part + tl.arange(0, SOME)
            here = tl.load(largest + first + i, mask=i < mine, other=float("-inf"))
            now = tl.maximum(most, tl.max(here, 0))
            against = tl.where(now == float("-inf"), 0.0, now)  # nothing was seen so far
            kept = tl.exp(most - against)
            weights = tl.exp(here - against)
            there = (i[:, None] < mine) & (d[None, :] < DIM)
            its = tl.load(found + (first + i[:, None]) * DIM + d[None, :], mask=there, other=0.0)
            total = total * kept + tl.sum(weights * tl.load(sums + first + i, mask=i < mine, other=0.0), 0)
            mixed = mixed * kept + tl.sum(weights[:, None] * its, 0)
            most = now
            part += SOME
        tl.store(out + (row * HEADS + head) * DIM + d, mixed / total, mask=d < DIM)
