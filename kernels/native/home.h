// What the parts of the library say to each other: a home is the kernels compiled for one machine.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace shoal {

// rows × cols weights of a GGUF type at any alignment: rows of a float type one after the other, of a quantised type
// in bands (`bands.h`), the last one filled up.
struct Weights {
    int32_t type;
    int64_t rows, cols;
    const void* data;
};

// What cached numbers are stored as.
enum Cell : int32_t { CELL_F32 = 0, CELL_F16 = 1, CELL_BF16 = 2, CELL_I8 = 3 };

// Keys and values of one layer in pages of 64 positions, `page_bytes` apart. In a page, one K/V head after the other:
// its keys, dimension by dimension (head_dim, 64); its values, position by position (64, head_dim filled up to a
// multiple of 16); and for CELL_I8 the scales of the keys and of the values, 64 floats each.
struct KvPages {
    int32_t cell;
    int32_t heads, kv_heads, head_dim;
    int64_t page_bytes;
    uint8_t* data;
};

// Rows [first, first + tokens) of a step are positions from `start` on of a sequence in `pages`.
struct Segment {
    int32_t first, tokens, start, pages;  // the last: where its page numbers begin in the step's list
};

struct Segments {
    int64_t count, tokens;
    const Segment* all;
    const int32_t* pages;
};

// Angles of a step's positions: cos and sin (tokens, dims / 2). Pairs are (2i, 2i + 1) or (i, i + dims / 2).
struct Rotation {
    int64_t dims;
    int32_t interleaved;
    const float *cos, *sin;
};

// A step's q (tokens, heads * head_dim), k and v (tokens, kv_heads * head_dim), before rotation; each head of q and k is
// normalised first unless q_norm and k_norm (head_dim,) are null. With a window > 0, position p sees (p - window, p].
struct Attention {
    KvPages kv;
    Segments segments;
    Rotation rotation;
    const float *q, *k, *v, *q_norm, *k_norm;
    float norm_eps, scale;
    int64_t window;
};

// A matrix and what is added to its products: bias (rows,), or null.
struct Linear {
    Weights w;
    const float* bias;
};

// x (tokens, cols), normalised by `norm` (cols,) before anything else unless that is null.
struct Inputs {
    const float* x;
    int64_t cols;
    const float* norm;
    float eps;
};

enum Activation : int32_t { SILU = 0, GELU = 1 };

// Which tokens go to which experts: expert i takes tokens[starts[i]..starts[i + 1]), ascending, its results times
// `factors`.
struct Routing {
    int64_t experts;
    const int64_t *starts, *tokens;
    const float* factors;
};

enum Status : int { OK = 0, BAD_TYPE = 1, NO_MEMORY = 2, NO_ROW = 3 };

struct Home {
    const char* name;
    // y[i] (tokens, rows of all[i]) = x @ all[i].w.T + all[i].bias. Quantised weights meet x rounded to 16 bits.
    Status (*linears)(const Inputs& x, int64_t tokens, int count, const Linear* all, float* const* y);
    // y (tokens, rows of down) = (act(x @ gate.T) * (x @ up.T)) @ down.T; `all` are gate, up and down.
    Status (*gated)(const Inputs& x, int64_t tokens, Activation act, const Linear* all, float* y);
    // y (tokens, rows of down) += expert after expert of every token, ascending; all[i] is one's gate, up, down.
    Status (*experts)(const Inputs& x, int64_t tokens, Activation act, const Linear* const* all, const Routing& routing,
                      float* y);
    // out (count, cols): the rows `ids`, or the first `count` rows if ids is null. NO_ROW if there is none such.
    Status (*gather_rows)(const Weights& w, const int64_t* ids, int64_t count, float* out);
    Status (*rms_norm)(const float* x, const float* weight, float eps, int64_t rows, int64_t cols, float* y);
    // Stores the step's keys and values, then out (tokens, heads * head_dim): what every position sees of its sequence.
    Status (*attention)(const Attention& a, float* out);
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

// rows × blocks as files hold them, row after row; of a block, two bytes at each of `halves` (-1: none) are a number
// in half precision.
struct Stored {
    int64_t rows, blocks, block_bytes, halves[2];
    const uint8_t* data;
};

// The same blocks in bands, the last one filled up with zeros.
void interleave(const Stored& from, uint8_t* to);

}  // namespace shoal
