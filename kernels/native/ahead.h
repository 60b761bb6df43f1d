// What is fetched while blocks of keys or values are in use: the blocks that are read next, at an even pace.
//
// Knows lines of a cache, not what lies in them.
#pragma once
#include "product.h"

namespace {

constexpr int64_t LINE = 64;        // bytes
constexpr int64_t FOLLOWED = 4096;  // bytes in which a processor's own prefetcher follows a stream
constexpr int64_t MOST_STREAMS = 4;  // in a block

INLINE void fetch_line(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

INLINE void fetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) fetch_line(from + i);
}

// What to fetch of two blocks: the first or the second half of each stream, that is of each FOLLOWED bytes, a line of
// every stream in turn. A thread may ask for so few lines at a time that memory could give more; what the processor's
// own prefetcher asks for comes in addition, and it runs ahead in every stream.
struct Ahead {
    const uint8_t* blocks[2] = {nullptr, nullptr};  // or nothing
    int64_t apart = 0, end = 0, at = 0;

    Ahead() = default;
    // `second` may be null.
    Ahead(const uint8_t* first, const uint8_t* second, int64_t bytes, bool second_half)
        : blocks{first, second ? second : first} {
        const int64_t streams = most<int64_t>(least(bytes / FOLLOWED, MOST_STREAMS), 1);
        apart = bytes / (streams * LINE) * LINE;
        end = streams * apart;
        at = second_half ? apart / (2 * LINE) * LINE : 0;
    }

    // Of block 0 and of block 1 in turn.
    INLINE void fetch_next(int64_t block) {
        fetch_line(blocks[block] + at);
        if (block == 0) return;
        at += apart;
        if (at >= end) at -= end - LINE;
    }
};

// Takes steps [from, to), each of which uses `bytes` of a block, and fetches as many meanwhile, if there is anything.
// Requests come evenly, because those that come together wait for each other.
template <int bytes, class Step>
INLINE void fetching(Ahead& ahead, int64_t from, int64_t to, Step step) {
    constexpr int64_t steps = bytes < LINE ? LINE / bytes : 1, lines = bytes < LINE ? 1 : bytes / LINE;
    constexpr int64_t rounds = lines % 2 + 1;  // for whole pairs of lines
    if (ahead.blocks[0]) {
        Ahead next = ahead;
        for (; from + rounds * steps <= to; from += rounds * steps) {
            for (int64_t r = 0; r < rounds; r++) {
                for (int64_t i = 0; i < lines; i++) next.fetch_next((r + i) % 2);
                for (int64_t i = 0; i < steps; i++) step(from + r * steps + i);
            }
        }
        ahead = next;
    }
    for (; from < to; from++) step(from);
}

}  // namespace
