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

// The keys and values of one sequence in one layer: `kv_heads` × `length` rows of `head_dim` numbers of a
// float type, strides in bytes; and how `heads` queries look at them.
struct Cache {
    int32_t type;
    int64_t heads, kv_heads, head_dim, length;
    const void* keys;
    int64_t key_head_bytes, key_bytes;
    const void* values;
    int64_t value_head_bytes, value_bytes;
    float scale;
};

enum Status : int { OK = 0, BAD_TYPE = 1, NO_MEMORY = 2, NO_ROW = 3 };

struct Home {
    const char* name;
    // y (tokens, rows) = x (tokens, cols) @ w.T + bias; bias may be null. Quantised weights meet x rounded to bytes.
    Status (*linear)(const Weights& w, const float* x, int64_t tokens, const float* bias, float* y);
    // out (count, cols): the rows `ids`, or the first `count` rows if ids is null. NO_ROW if there is none such.
    Status (*gather_rows)(const Weights& w, const int64_t* ids, int64_t count, float* out);
    Status (*rms_norm)(const float* x, const float* weight, float eps, int64_t rows, int64_t cols, float* y);
    Status (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
    Status (*geglu)(const float* gate, const float* up, int64_t n, float* y);
    // q, out (heads, head_dim): one token that sees the whole cache. BAD_TYPE also for odd head sizes.
    Status (*attention)(const Cache& cache, const float* q, float* out);
};

// A unit of work: the `index`-th of a run, done by one of the pool's threads.
using Job = void (*)(const void* context, int64_t index, int worker);

// The pool, for the length of one kernel; kernels called from several threads take turns.
class Turn {
public:
    Turn();
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    // Threads that runs may use, the calling one included; workers are numbered below it.
    int threads() const;
    // Memory for the length of the turn, aligned to pages; null if there is none. Once per turn.
    void* reserve(size_t bytes);
    // Runs jobs 0..count, each once, and returns when all are done. A run whose `work` (in multiply-adds)
    // would not repay waking others stays on the calling thread.
    void run(int64_t count, int64_t work, Job job, const void* context);
};

void set_threads(int count);

}  // namespace shoal
