// The thread pool: who runs the jobs of a kernel, and when threads sleep.
//
// Workers spin for some tens of microseconds after the last job, because the next kernel of a step
// usually follows at once, let others run instead for some hundreds, and then sleep on a condition
// variable: an idle process burns nothing. The calling thread works too. The pool is never destroyed
// (threads may outlive static objects) and a forked child starts with a fresh one.
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "home.h"

namespace shoal {
namespace {

// Between two kernels of a step lie some tens of microseconds of Python, and twice that where large weights have swept it
// out of the caches. To be woken takes as long again.
constexpr auto SPIN = std::chrono::microseconds(60);
constexpr auto LINGER = std::chrono::microseconds(300);  // with SPIN; whoever else wants the processor gets it
constexpr int64_t WORTH_WAKING = 1 << 16;  // multiply-adds; some 5 µs on one thread
constexpr size_t LINE = 64;
constexpr int MOST_THREADS = 1024;

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One atomic word says which run is on, how many jobs it has and which is next. A thread that arrives late draws a
// number beyond the count, and so it never looks at a run that may be over. Each thread has a word of its own, for a
// share of consecutive jobs, because then it has prefetched what it computes next. When its share is done, it helps
// with the shares of the others.
struct Ticket {
    static constexpr int BITS = 20;
    static constexpr uint64_t MASK = (1 << BITS) - 1;
    uint64_t word;
    uint64_t next() const { return word & MASK; }
    uint64_t count() const { return word >> BITS & MASK; }
    uint64_t run() const { return word >> 2 * BITS; }
};

constexpr int64_t MOST_JOBS = Ticket::MASK - MOST_THREADS;

class Pool {
public:
    explicit Pool(int threads) : threads_(threads), shares_((size_t)threads) {}

    std::mutex turn;  // held for the length of a kernel

    int threads() const { return threads_; }

    void resize(int threads) {
        if (threads == threads_) return;
        stop();
        threads_ = threads;
        shares_ = std::vector<Share>((size_t)threads);
    }

    void run(int64_t count, int64_t work, Job job, const void* context) {
        if (threads_ == 1 || count == 1 || work < WORTH_WAKING) {
            for (int64_t i = 0; i < count; i++) job(context, i, 0);
            return;
        }
        if (workers_.empty()) start();
        job_ = job;
        context_ = context;
        for (int64_t first = 0; first < count; first += MOST_JOBS) {
            const int64_t part = count - first < MOST_JOBS ? count - first : MOST_JOBS;
            undone_.store(part, std::memory_order_relaxed);
            runs_++;
            for (int i = threads_ - 1; i >= 0; i--) {  // the first share last: others wait for its word
                const int64_t from = part * i / threads_, until = part * (i + 1) / threads_;
                shares_[(size_t)i].first = first + from;
                shares_[(size_t)i].ticket.store(runs_ << 2 * Ticket::BITS | (uint64_t)(until - from) << Ticket::BITS);
            }
            if (sleepers_.load() > 0) {
                { std::lock_guard<std::mutex> lock(sleep_); }
                wake_.notify_all();
            }
            take_jobs(0);
            for (int spins = 0; undone_.load(std::memory_order_acquire) > 0; spins++) {
                spins < 100 ? pause_cpu() : (void)sched_yield();
            }
        }
    }

    void* reserve(size_t bytes) {
        if (bytes <= reserved_) return memory_;
        free(memory_);
        reserved_ = 0;
        if (posix_memalign(&memory_, 4096, bytes)) memory_ = nullptr;
        if (memory_) reserved_ = bytes;
        return memory_;
    }

private:
    struct alignas(LINE) Share {
        std::atomic<uint64_t> ticket{0};
        int64_t first = 0;
    };

    void take_jobs(int worker) {
        for (int i = 0; i < threads_; i++) {
            Share& share = shares_[(size_t)((worker + i) % threads_)];
            for (;;) {
                const Ticket drawn{share.ticket.fetch_add(1, std::memory_order_acq_rel)};
                if (drawn.next() >= drawn.count()) break;
                job_(context_, share.first + (int64_t)drawn.next(), worker);
                undone_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    void work(int worker) {
        uint64_t seen = 0;
        for (;;) {
            if (!await(seen)) return;
            seen = Ticket{shares_[0].ticket.load()}.run();
            take_jobs(worker);
        }
    }

    // Waits until a run other than `seen` is on, spinning first; false if the pool stops.
    bool await(uint64_t seen) {
        const auto news = [&] { return stopping_.load() || Ticket{shares_[0].ticket.load()}.run() != seen; };
        const auto began = std::chrono::steady_clock::now();
        while (!news()) {
            for (int i = 0; i < 16 && !news(); i++) pause_cpu();
            const auto waited = std::chrono::steady_clock::now() - began;
            if (waited < SPIN) continue;
            if (waited < LINGER) {
                sched_yield();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, news);
            sleepers_.fetch_sub(1);
        }
        return !stopping_.load();
    }

    void start() {
        stopping_.store(false);
        for (int i = 1; i < threads_; i++) {
            try {
                workers_.emplace_back([this, i] { work(i); });
            } catch (const std::system_error&) {
                break;  // the system grants no more threads; fewer can do the work
            }
        }
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(sleep_);
            stopping_.store(true);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    int threads_;
    std::vector<std::thread> workers_;
    void* memory_ = nullptr;
    size_t reserved_ = 0;

    Job job_ = nullptr;
    const void* context_ = nullptr;
    uint64_t runs_ = 0;
    std::vector<Share> shares_;
    alignas(LINE) std::atomic<int64_t> undone_{0};
    alignas(LINE) std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
    std::mutex sleep_;
    std::condition_variable wake_;
};

int default_threads() {
    const unsigned n = std::thread::hardware_concurrency();
    return n ? (int)n : 1;
}

Pool* pool = new Pool(default_threads());

// The parent's workers and locks do not exist in a forked child, so it leaves the parent's pool as it is.
const int forked = pthread_atfork(nullptr, nullptr, [] { pool = new Pool(pool->threads()); });

}  // namespace

Turn::Turn() { pool->turn.lock(); }
Turn::~Turn() { pool->turn.unlock(); }
int Turn::threads() const { return pool->threads(); }
void* Turn::reserve(size_t bytes) { return pool->reserve(bytes); }
void Turn::run(int64_t count, int64_t work, Job job, const void* context) {
    pool->run(count, work, job, context);
}

void set_threads(int count) {
    std::lock_guard<std::mutex> lock(pool->turn);
    pool->resize(count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : count);
}

}  // namespace shoal
