// The library's C interface: which home serves this machine, and the calls.
//
// Pointers and sizes have been checked by the caller; data may lie at any alignment.
#include <string.h>
#if defined(SHOAL_AVXVNNI)
#include <cpuid.h>
#endif
#if defined(SHOAL_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "home.h"

namespace shoal {
namespace homes {
#if defined(SHOAL_X86)
extern const Home avx512vnni, avx512, avx2, scalar;
#if defined(SHOAL_AVXVNNI)
extern const Home avxvnni;
#endif
#elif defined(SHOAL_ARM)
extern const Home neon_dot, neon;
#else
extern const Home scalar;
#endif
}  // namespace homes

namespace {

bool runs_here(const Home& home) {
#if defined(SHOAL_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (&home == &homes::avx2) return avx2;
#if defined(SHOAL_AVXVNNI)
    if (&home == &homes::avxvnni) {
        unsigned a, b, c, d;
        return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
    }
#endif
    if (&home == &homes::avx512 || &home == &homes::avx512vnni) {
        return avx2 && (&home == &homes::avx512 || __builtin_cpu_supports("avx512vnni")) &&
               __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
#elif defined(SHOAL_ARM) && defined(__linux__)
    if (&home == &homes::neon_dot) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(SHOAL_ARM) && !defined(__APPLE__)  // all Apple machines of this kind have it
    if (&home == &homes::neon_dot) return false;
#endif
    (void)home;
    return true;
}

// Best first.
const Home* const all[] = {
#if defined(SHOAL_X86)
    &homes::avx512vnni, &homes::avx512,
#if defined(SHOAL_AVXVNNI)
    &homes::avxvnni,
#endif
    &homes::avx2, &homes::scalar,
#elif defined(SHOAL_ARM)
    &homes::neon_dot, &homes::neon,
#else
    &homes::scalar,
#endif
};

const Home* chosen = all[sizeof all / sizeof all[0] - 1];

}  // namespace
}  // namespace shoal

#define API extern "C" __attribute__((visibility("default")))

// Changes whenever a signature below does; the Python side refuses a library that does not match.
API int shoal_version() { return 7; }

// From now on the home with this name computes, or the best one if the name is empty. Returns its name, or null if this
// machine cannot run it.
API const char* shoal_choose(const char* name) {
    for (const shoal::Home* home : shoal::all) {
        if ((!*name || !strcmp(name, home->name)) && shoal::runs_here(*home)) {
            shoal::chosen = home;
            return home->name;
        }
    }
    return nullptr;
}

API void shoal_set_threads(int count) { shoal::set_threads(count); }

API void shoal_interleave(int64_t rows, int64_t blocks, int64_t block_bytes, int64_t first_half, int64_t second_half,
                          const uint8_t* stored, uint8_t* bands) {
    shoal::interleave({rows, blocks, block_bytes, {first_half, second_half}, stored}, bands);
}

API int shoal_linears(const float* x, int64_t tokens, int64_t cols, const float* norm, float eps, int count,
                      const shoal::Linear* all, float* const* y) {
    return shoal::chosen->linears({x, cols, norm, eps}, tokens, count, all, y);
}

API int shoal_gated(const float* x, int64_t tokens, int64_t cols, const float* norm, float eps, int32_t act,
                    const shoal::Linear* all, float* y) {
    return shoal::chosen->gated({x, cols, norm, eps}, tokens, (shoal::Activation)act, all, y);
}

API int shoal_experts(const float* x, int64_t tokens, int64_t cols, int32_t act, int64_t experts,
                      const shoal::Linear* const* all, const int64_t* starts, const int64_t* routed,
                      const float* factors, float* y) {
    return shoal::chosen->experts({x, cols, nullptr, 0}, tokens, (shoal::Activation)act, all,
                                  {experts, starts, routed, factors}, y);
}

API int shoal_scores(const float* x, int64_t tokens, int64_t cols, const shoal::Linear* router, float* y) {
    return shoal::chosen->scores({x, cols, nullptr, 0}, tokens, *router, y);
}

API int64_t shoal_route(const float* scores, int64_t tokens, int64_t experts, int64_t count, int32_t normalize,
                        int64_t* used, int64_t* starts, int64_t* routed, float* factors) {
    return shoal::route({scores, tokens, experts, count, normalize != 0}, used, starts, routed, factors);
}

API int shoal_gather_rows(const shoal::Linear* linear, const int64_t* ids, int64_t count, float* out) {
    return shoal::chosen->gather_rows(linear->w, ids, count, out);
}

API int shoal_rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t cols, float* y) {
    return shoal::chosen->rms_norm(x, weight, eps, rows, cols, y);
}

API int shoal_attention(const shoal::KvPages* kv, const shoal::Segments* segments, const shoal::Rotation* rotation,
                        const float* q, const float* k, const float* v, const float* q_norm, const float* k_norm,
                        float norm_eps, float scale, int64_t window, float* out) {
    return shoal::chosen->attention({*kv, *segments, *rotation, q, k, v, q_norm, k_norm, norm_eps, scale, window}, out);
}
