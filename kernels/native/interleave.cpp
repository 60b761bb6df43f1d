// Rows of stored blocks into bands: the permutation that `bands.h` describes, the same for every machine.
#include <string.h>

#include "home.h"

namespace shoal {
namespace {

constexpr int BAND = 16;  // rows

struct Interleaving {
    const Stored& from;
    uint8_t* to;
};

template <int BYTES>
void copy_pieces(const uint8_t* from, int64_t row_bytes, int64_t rows, uint8_t* to) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + r * BYTES, from + r * row_bytes, BYTES);
    memset(to + rows * BYTES, 0, (size_t)(BAND - rows) * BYTES);
}

void interleave_job(const void* context, int64_t band, int) {
    const Interleaving& i = *static_cast<const Interleaving*>(context);
    const Stored& s = i.from;
    const int64_t row_bytes = s.blocks * s.block_bytes, left = s.rows - band * BAND;
    const int64_t rows = left < BAND ? left : BAND;
    const uint8_t* from = s.data + band * BAND * row_bytes;
    uint8_t* to = i.to + band * BAND * row_bytes;
    for (int64_t b = 0; b < s.blocks; b++, from += s.block_bytes, to += BAND * s.block_bytes) {
        for (int64_t at = 0; at < s.block_bytes;) {
            const bool half = at == s.halves[0] || at == s.halves[1];
            half ? copy_pieces<2>(from + at, row_bytes, rows, to + BAND * at)
                 : copy_pieces<4>(from + at, row_bytes, rows, to + BAND * at);
            at += half ? 2 : 4;
        }
    }
}

}  // namespace

void interleave(const Stored& from, uint8_t* to) {
    const Interleaving i{from, to};
    Turn().run((from.rows + BAND - 1) / BAND, from.rows * from.blocks * from.block_bytes, interleave_job, &i);
}

}  // namespace shoal
