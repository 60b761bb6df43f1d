// The kernels of one machine: this file is compiled once per home, with that machine's vector registers.
//
// Every output is computed by the same float operations whatever is computed beside it.
#include "attention.h"
#include "elementwise.h"
#include "linear_float.h"
#include "linear_int8.h"

namespace {

using shoal::Status;
using shoal::Weights;

// By GGUF type id.
const Type* find_type(int32_t id) {
    static constexpr Type types[] = {
        float_type<F32>(), float_type<F16>(), int8_type<Q4_0>(), int8_type<Q4_1>(), {},
        {},                int8_type<Q5_0>(), int8_type<Q5_1>(), int8_type<Q8_0>(), {},
        int8_type<Q2_K>(), int8_type<Q3_K>(), int8_type<Q4_K>(), int8_type<Q5_K>(), int8_type<Q6_K>(),
        {},                {},                {},                {},                {},
        int8_type<IQ4_NL>(),
    };
    static constexpr Type bf16 = float_type<BF16>();
    if (id == 30) return &bf16;
    if (id < 0 || id >= (int32_t)(sizeof types / sizeof types[0]) || !types[id].dot_rows) return nullptr;
    return &types[id];
}

Status linear(const Weights& w, const float* x, int64_t tokens, const float* bias, float* y) {
    const Type* type = find_type(w.type);
    if (!type) return shoal::BAD_TYPE;
    if (w.rows == 0 || tokens == 0) return shoal::OK;
    Linear l{w, *type, x, bias, y, 0, 0, 0, 0, nullptr, nullptr};
    return run_linear(l, tokens);
}

struct Gather {
    const Weights& w;
    const Type& type;
    const int64_t* ids;
    float* out;
};

void gather_job(const void* context, int64_t index, int) {
    const Gather& g = *static_cast<const Gather*>(context);
    const int64_t row = g.ids ? g.ids[index] : index;
    g.type.decode_row(static_cast<const uint8_t*>(g.w.data) + row * g.w.row_bytes, g.w.cols, g.out + index * g.w.cols);
}

Status gather_rows(const Weights& w, const int64_t* ids, int64_t count, float* out) {
    const Type* type = find_type(w.type);
    if (!type) return shoal::BAD_TYPE;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = ids ? ids[i] : i;
        if (row < 0 || row >= w.rows) return shoal::NO_ROW;
    }
    const Gather g{w, *type, ids, out};
    shoal::Turn().run(count, count * w.cols, gather_job, &g);
    return shoal::OK;
}

}  // namespace

#define NAME_(home) #home
#define NAME(home) NAME_(home)

namespace shoal {
namespace homes {
extern const Home SHOAL_HOME;
const Home SHOAL_HOME = {NAME(SHOAL_HOME), linear, gather_rows, rms_norm, gated<silu>, gated<gelu>, attention};
}  // namespace homes
}  // namespace shoal
