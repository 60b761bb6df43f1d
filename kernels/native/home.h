// What the parts of the library say to each other: a home is the kernels compiled for one machine.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace shoal {

// rows × cols weights of a GGUF type; rows start `row_bytes` apart, at any alignment.
struct Weights {
    int32_t type;
    int64_t rows, cols, row_bytes;
    const void* data;
};

enum Status : int { OK = 0, BAD_TYPE = 1, NO_MEMORY = 2, NO_ROW = 3 };

struct Home {
    const char* name;
    // y (tokens, rows) = x (tokens, cols) @ w.T + bias; bias may be null.
    Status (*linear)(const Weights& w, const float* x, int64_t tokens, const float* bias, float* y);
    // out (count, cols): the rows `ids`, or the first `count` rows if ids is null. NO_ROW if there is no such row.
    Status (*gather_rows)(const Weights& w, const int64_t* ids, int64_t count, float* out);
    Status (*rms_norm)(const float* x, const float* weight, float eps, int64_t rows, int64_t cols, float* y);
    Status (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
    Status (*geglu)(const float* gate, const float* up, int64_t n, float* y);
};

// A unit of work: the `index`-th of a parallel call, with scratch memory that no other thread uses.
using Job = void (*)(const void* context, int64_t index, void* scratch);

// Runs jobs 0..count, each once, on the pool and the calling thread; returns when all are done. A call
// whose `work` (in multiply-adds) would not repay waking others stays on the calling thread. Calls from
// several threads take turns. NO_MEMORY, with nothing done, if the scratch cannot be had.
Status parallel(int64_t count, int64_t work, Job job, const void* context, size_t scratch_bytes);

void set_threads(int count);
int threads();

}  // namespace shoal
