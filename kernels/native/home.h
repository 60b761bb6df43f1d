// The types and functions that the parts of the library share. A home is the kernels compiled for one machine.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace shoal {

// rows × cols weights of a GGUF type at any alignment. Rows of a float type lie one after the other, those of a
// quantised type in bands (`bands.h`), of which the last is filled up.
struct Weights {
    int32_t type;
    int64_t rows, cols;
    const void* data;
};

// How cached keys and values are stored.
enum Cell : int32_t { CELL_F32 = 0, CELL_F16 = 1, CELL_BF16 = 2, CELL_I8 = 3 };

// Keys and values of one layer in pages of 64 positions, `page_bytes` apart. In a page the K/V heads follow each other.
// Each has its keys, dimension by dimension (head_dim, 64); its values, position by position (64, head_dim filled up to
// a multiple of 16); and for CELL_I8 the scales of the keys and of the values, 64 floats each.
struct KvPages {
    int32_t cell;
    int32_t heads, kv_heads, head_dim;
    int64_t page_bytes;
    uint8_t* data;
};

// Rows [first, first + tokens) of a step are the positions of one sequence from `start` on.
struct Segment {
    int32_t first, tokens, start, pages;  // pages: where its page numbers begin in the step's list
};

struct Segments {
    int64_t count, tokens;
    const Segment* all;
    const int32_t* pages;
};

// Angles of a step's positions: cos and sin (tokens, dims / 2). Pairs are (2i, 2i + 1) if interleaved, else (i, i +
// dims / 2).
struct Rotation {
    int64_t dims;
    int32_t interleaved;
    const float *cos, *sin;
};

// A step's q (tokens, heads * head_dim), k and v (tokens, kv_heads * head_dim), before rotation. Unless q_norm and
// k_norm (head_dim,) are null, each head of q and k is normalised first. With a window > 0, position p sees (p -
// window, p].
struct Attention {
    KvPages kv;
    Segments segments;
    Rotation rotation;
    const float *q, *k, *v, *q_norm, *k_norm;
    float norm_eps, scale;
    int64_t window;
};

// A matrix and the bias (rows,) that is added to its products, or null. Inputs of quantised weights are rounded to
// `input_bits`: 16 or 8.
struct Linear {
    Weights w;
    const float* bias;
    int32_t input_bits;
};

// x (tokens, cols). Unless `norm` (cols,) is null, x is normalised first.
struct Inputs {
    const float* x;
    int64_t cols;
    const float* norm;
    float eps;
};

enum Activation : int32_t { SILU = 0, GELU = 1 };

// Which tokens go to which experts: expert i takes tokens[starts[i]..starts[i + 1]), ascending, and its results are
// multiplied by `factors`.
struct Routing {
    int64_t experts;
    const int64_t *starts, *tokens;
    const float* factors;
};

enum Status : int { OK = 0, BAD_TYPE = 1, NO_MEMORY = 2, NO_ROW = 3 };

struct Home {
    const char* name;
    // y[i] (tokens, rows of all[i]) = x @ all[i].w.T + all[i].bias.
    Status (*linears)(const Inputs& x, int64_t tokens, int count, const Linear* all, float* const* y);
    // y (tokens, rows of down) = (act(x @ gate.T) * (x @ up.T)) @ down.T; `all` are gate, up and down.
    Status (*gated)(const Inputs& x, int64_t tokens, Activation act, const Linear* all, float* y);
    // y (tokens, rows of down) += the results of every token's experts, ascending; all[i] are gate, up, down of one.
    Status (*experts)(const Inputs& x, int64_t tokens, Activation act, const Linear* const* all, const Routing& routing,
                      float* y);
    // y (tokens, rows) = x @ router.w.T + router.bias, in an order that is the same in every home: the same bits.
    Status (*scores)(const Inputs& x, int64_t tokens, const Linear& router, float* y);
    // out (count, cols): the rows `ids`, or the first `count` rows if ids is null. NO_ROW if an id is out of range.
    Status (*gather_rows)(const Weights& w, const int64_t* ids, int64_t count, float* out);
    // The same bits in every home.
    Status (*rms_norm)(const float* x, const float* weight, float eps, int64_t rows, int64_t cols, float* y);
    // Stores the step's keys and values, then lets every position attend to its sequence: out (tokens, heads *
    // head_dim).
    Status (*attention)(const Attention& a, float* out);
};

// A unit of work: the `index`-th of a run, done by one of the pool's threads.
using Job = void (*)(const void* context, int64_t index, int worker);

// Has the pool while one kernel runs; kernels that are called from several threads take turns.
class Turn {
public:
    Turn();
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    // How many threads a run may use, with the calling one. The `worker` of a job is below that.
    int threads() const;
    // Memory until the turn ends, aligned to pages; null if there is none. To be called once in a turn.
    void* reserve(size_t bytes);
    // Runs jobs [0, count), each once, and returns when all are done. If the `work` (in multiply-adds) is not worth
    // waking others for, the calling thread does all of it.
    void run(int64_t count, int64_t work, Job job, const void* context);
};

void set_threads(int count);

// Scores (tokens, experts) of a router. Each token goes to its `count` best experts, the lowest among equals; its
// factors are its softmax, over these if `normalize`, else over all.
struct Choice {
    const float* scores;
    int64_t tokens, experts, count;
    bool normalize;
};

// The routing (see `Routing`) to the experts in use: starts (experts + 1,), tokens and factors (tokens * count,), and
// which experts these are: used (experts,). → how many are in use; -1 without memory.
int64_t route(const Choice& choice, int64_t* used, int64_t* starts, int64_t* tokens, float* factors);

// rows × blocks as files hold them, row after row. At each of `halves` (-1: none), two bytes of a block are a number in
// half precision.
struct Stored {
    int64_t rows, blocks, block_bytes, halves[2];
    const uint8_t* data;
};

// Writes the same blocks in bands, of which the last is filled up with zeros.
void interleave(const Stored& from, uint8_t* to);

}  // namespace shoal
