// Which experts tokens go to, by the scores of a router: `routing.py`, in one call and the same for every machine.
#include <math.h>
#include <string.h>

#include "home.h"

namespace shoal {
namespace {

constexpr int64_t SIGN = INT64_MIN, EXPERT = (1 << 29) - 1;

// How far a score is below the best of its token, and whose it is, as one number to sort by: distances sort as their
// bits do, and an f32 leaves the lowest 29 bits of an f64 zero. What is no number comes last, whatever its sign.
int64_t key_of(float best, float score, int64_t expert) {
    const double behind = best - score;
    int64_t bits;
    memcpy(&bits, &behind, sizeof bits);
    return (bits & ~SIGN) | expert;
}

double odds_of(int64_t key) {
    const int64_t bits = key & ~EXPERT;
    double behind;
    memcpy(&behind, &bits, sizeof behind);
    return exp(-behind);
}

struct Choosing {
    const Choice& choice;
    int64_t* keys;   // (tokens, count), the best first
    float* factors;  // (tokens, count)
};

void choose_job(const void* context, int64_t token, int) {
    const Choosing& c = *static_cast<const Choosing*>(context);
    const int64_t experts = c.choice.experts, count = c.choice.count;
    const float* scores = c.choice.scores + token * experts;
    int64_t* keys = c.keys + token * count;
    float* factors = c.factors + token * count;
    float best = -INFINITY;
    for (int64_t e = 0; e < experts && best == best; e++) {
        if (!(scores[e] <= best)) best = scores[e];
    }
    double total = 0;
    for (int64_t e = 0; e < experts; e++) {
        const int64_t key = key_of(best, scores[e], e);
        if (!c.choice.normalize) total += odds_of(key);
        int64_t at = e < count ? e : count;
        if (at == count && key > keys[count - 1]) continue;
        for (at -= at == count; at > 0 && keys[at - 1] > key; at--) keys[at] = keys[at - 1];
        keys[at] = key;
    }
    if (c.choice.normalize) {
        for (int64_t i = 0; i < count; i++) total += odds_of(keys[i]);
    }
    for (int64_t i = 0; i < count; i++) factors[i] = (float)(odds_of(keys[i]) / total);
}

}  // namespace

int64_t route(const Choice& choice, int64_t* used, int64_t* starts, int64_t* tokens, float* factors) {
    const int64_t pairs = choice.tokens * choice.count;
    Turn turn;
    char* memory = static_cast<char*>(
        turn.reserve((size_t)pairs * (sizeof(int64_t) + sizeof(float)) + (size_t)choice.experts * sizeof(int64_t)));
    if (!memory) return -1;
    int64_t* keys = reinterpret_cast<int64_t*>(memory);
    int64_t* next = keys + pairs;  // of an expert: how many tokens it has, then where the next one goes
    float* shares = reinterpret_cast<float*>(next + choice.experts);
    const Choosing choosing{choice, keys, shares};
    turn.run(choice.tokens, choice.tokens * choice.experts * 16, choose_job, &choosing);
    memset(next, 0, (size_t)choice.experts * sizeof *next);
    for (int64_t i = 0; i < pairs; i++) next[keys[i] & EXPERT]++;
    int64_t count = 0, start = 0;
    for (int64_t e = 0; e < choice.experts; e++) {
        const int64_t its = next[e];
        next[e] = start;
        if (!its) continue;
        used[count] = e;
        starts[count++] = start;
        start += its;
    }
    starts[count] = start;
    for (int64_t t = 0; t < choice.tokens; t++) {
        for (int64_t i = t * choice.count; i < (t + 1) * choice.count; i++) {
            const int64_t place = next[keys[i] & EXPERT]++;
            tokens[place] = t;
            factors[place] = shares[i];
        }
    }
    return count;
}

}  // namespace shoal
