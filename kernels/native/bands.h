// Bands: sixteen rows of quantised weights, interleaved; the integer half of the vector layer.
//
// A block of a band holds the same block of sixteen rows, cut into pieces of four bytes (half-precision fields are
// pieces of two), and the same pieces of all rows lie side by side: what lies `offset` bytes into a row's block begins
// 16 * offset bytes into the band's. So a lane of a vector is a row, four columns deep, and nothing moves between
// lanes. Knows how such vectors are loaded; knows nothing of weight types.
#pragma once
#include "simd.h"

namespace {

constexpr int BAND = 16;             // rows
constexpr int PARTS = BAND / LANES;  // vectors in a line of a band

// Loops over the lines of a block are unrolled, so that sums stay in registers; narrow machines have too few of those.
#if defined(__AVX2__)
#define UNROLL_BLOCK _Pragma("GCC unroll 32")
#else
#define UNROLL_BLOCK _Pragma("GCC unroll 1")
#endif

typedef uint8_t vb __attribute__((vector_size(LANES * 4)));
typedef int16_t vw __attribute__((vector_size(LANES * 4)));
typedef uint16_t vuw __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));

// One of the PARTS of a band's block: LANES rows of it. Unless `ahead` is null, the reads of all parts together fetch as
// many bytes from there into the second-level cache: each part its share, so that requests come evenly, and in the order
// of addresses, whichever is read: then a processor's own prefetcher sees what comes and asks for more.
struct Lines {
    const uint8_t *fours, *twos, *ahead;
    mutable int reads = 0;

    INLINE Lines(const uint8_t* block, int part, const uint8_t* ahead)
        : fours(block + part * 4 * LANES), twos(block + part * 2 * LANES), ahead(ahead) {}
    INLINE vb line(int offset) const {
        fetch();
        return read<vb>(fours + BAND * offset);
    }
    INLINE vf halves(int offset) const {
        fetch();
        return load_half(twos + BAND * offset);
    }
    INLINE void fetch() const {
        const int place = reads++;
        if (ahead && place % PARTS == 0) __builtin_prefetch(ahead + 4 * LANES * place, 0, 2);
    }
};

// Shifts each byte right (left if negative) and masks it; the mask drops bits that come from neighbours.
INLINE vb bits(vb v, int right, uint8_t mask) {
    return (vb)(right < 0 ? (vuw)v << -right : (vuw)v >> right) & mask;
}

// A sum that may wrap around.
INLINE vi wrapped_sum(vi a, vi b) { return (vi)((vu)a + (vu)b); }

// Byte `i` of each lane, unsigned or signed.
INLINE vi byte_of(vb v, int i) { return (vi)v >> 8 * i & 255; }
INLINE vi signed_byte_of(vb v, int i) { return (vi)v << (24 - 8 * i) >> 24; }

// 16 bytes for every four lanes.
INLINE vb repeat16(const void* p) {
#if defined(__AVX512F__)
    return (vb)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (vb)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#else
    return read<vb>(p);
#endif
}

// Looks up bytes of v by index, within each 16.
#if defined(__AVX512F__)
INLINE vb shuffle(vb v, vb index) { return (vb)_mm512_shuffle_epi8((__m512i)v, (__m512i)index); }
#elif defined(__AVX2__)
INLINE vb shuffle(vb v, vb index) { return (vb)_mm256_shuffle_epi8((__m256i)v, (__m256i)index); }
#elif defined(__ARM_NEON)
INLINE vb shuffle(vb v, vb index) { return (vb)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)index); }
#else
__attribute__((noinline)) vb shuffle(vb v, vb index) {
    uint8_t bytes[16], from[16], moved[16];
    memcpy(bytes, &v, 16);
    memcpy(from, &index, 16);
    for (int i = 0; i < 16; i++) moved[i] = bytes[from[i] & 15];
    return read<vb>(moved);
}
#endif

}  // namespace
