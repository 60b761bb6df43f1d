// Bytes between ranks, where Python would be too slow or would keep others from its lock: looking for what comes before
// a thread sleeps, and rings in memory that two processes of one machine share.
//
// Nothing in shared memory is believed: each side keeps its own position to itself, and what the other one says of its
// position is read once and checked before it is used.
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

namespace {

constexpr size_t LINE = 64;
constexpr int64_t CROWDED_NS = 100'000;  // a look takes so long only if others have the processor
constexpr int PAUSES = 16;

uint64_t least(uint64_t one, uint64_t other) { return one < other ? one : other; }

int64_t now_ns() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr int32_t LOOKED = 1, CROWDED = 2;  // what it took to find bytes, or to find none

// A processor that nobody else wants may be used for looking; if somebody does, the thread that looks gives way.
struct Patience {
    int64_t began_ns = now_ns(), looked_ns = began_ns, limit_ns;
    int32_t effort = 0;  // or LOOKED, or CROWDED
    explicit Patience(int64_t limit) : limit_ns(limit) {}

    // Whether to look once more.
    bool again() {
        if (effort == CROWDED || limit_ns <= 0) return false;
        for (int i = 0; i < PAUSES; i++) pause_cpu();
        sched_yield();
        const int64_t now = now_ns();
        effort = now - looked_ns > CROWDED_NS ? CROWDED : LOOKED;
        looked_ns = now;
        return effort == CROWDED || now - began_ns <= limit_ns;  // what came meanwhile is taken
    }
};

// In shared memory; the bytes come behind it.
struct Ring {
    alignas(LINE) std::atomic<uint64_t> written;        // bytes, ever; the writer's
    alignas(LINE) std::atomic<uint64_t> taken;          // bytes, ever; the reader's
    alignas(LINE) std::atomic<uint32_t> reader_sleeps;  // and is to be woken
    alignas(LINE) std::atomic<uint32_t> writer_sleeps;
    alignas(LINE) uint8_t bytes[];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// One side of a ring, in the memory of the process whose side it is.
struct Side {
    void* ring;
    uint64_t size;   // of its bytes
    uint64_t count;  // bytes that this side has written or taken, ever
    int32_t bell;    // a socket; a byte in it says: look again
    int32_t effort;  // of the last `shoal_ring_read`
};

int32_t shoal_bytes_version() { return 1; }

int64_t shoal_ring_head() { return sizeof(Ring); }

// What comes to a socket within `limit_ns`, into `size` bytes: how many; 0 at the end; -EAGAIN if nothing came, another
// -errno if it failed. `effort`: 0, LOOKED or CROWDED.
int64_t shoal_look(int32_t descriptor, void* into, int64_t size, int64_t limit_ns, int32_t* effort) {
    Patience patience(limit_ns);
    int64_t count;
    do {
        count = recv(descriptor, into, (size_t)size, MSG_DONTWAIT);
        if (count < 0) count = errno == EINTR || errno == EWOULDBLOCK ? -EAGAIN : -errno;
    } while (count == -EAGAIN && patience.again());
    *effort = patience.effort;
    return count;
}

// Until something has come to one of `count` sockets, or there is room, as `poll` says it; at most `limit_ns`. How many
// there are. `effort` as above.
int32_t shoal_look_at_all(struct pollfd* all, int32_t count, int64_t limit_ns, int32_t* effort) {
    Patience patience(limit_ns);
    int32_t found;
    do {
        found = poll(all, (nfds_t)count, 0);
    } while (!found && patience.again());
    *effort = patience.effort;
    return found;
}

static void wake(std::atomic<uint32_t>& sleeps, int32_t bell) {
    std::atomic_thread_fence(std::memory_order_seq_cst);  // what was written before is seen, or the other is seen asleep
    if (sleeps.load(std::memory_order_relaxed) && sleeps.exchange(0)) {
        const uint8_t byte = 0;
        (void)!send(bell, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL);  // full: it will wake anyway. Gone: it is found later
    }
}

// Take what the bell says. False if the other side has gone.
static bool hush(int32_t bell) {
    uint8_t rung[LINE];
    const int64_t count = recv(bell, rung, sizeof rung, MSG_DONTWAIT);
    return count > 0 || (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR));
}

// As many of `size` bytes as there is room for: how many. If not all, the bell rings when there is more. -EPROTO: the
// other side says what cannot be; -EPIPE: it has gone.
int64_t shoal_ring_write(Side* side, const uint8_t* from, int64_t size) {
    Ring& ring = *static_cast<Ring*>(side->ring);
    int64_t done = 0;
    for (bool asleep = false;;) {
        const uint64_t used = side->count - ring.taken.load(std::memory_order_seq_cst);
        if (used > side->size) return -EPROTO;
        if (const uint64_t count = least(side->size - used, (uint64_t)(size - done))) {
            const uint64_t at = side->count % side->size, first = least(side->size - at, count);
            memcpy(ring.bytes + at, from + done, first);
            memcpy(ring.bytes, from + done + first, count - first);
            side->count += count;
            done += (int64_t)count;
            ring.written.store(side->count, std::memory_order_release);
            wake(ring.reader_sleeps, side->bell);
            asleep = false;
        }
        if (done == size || asleep) return done;
        ring.writer_sleeps.store(1, std::memory_order_seq_cst);
        if (!hush(side->bell)) return done ? done : -EPIPE;
        asleep = true;
    }
}

// What is there, or comes within `limit_ns`, into `size` bytes: how many. If none, the bell rings when there are some.
// -EPROTO and -EPIPE as above.
int64_t shoal_ring_read(Side* side, uint8_t* into, int64_t size, int64_t limit_ns) {
    Ring& ring = *static_cast<Ring*>(side->ring);
    Patience patience(limit_ns);
    bool asleep = false, gone = false;
    for (;;) {
        const uint64_t there = ring.written.load(std::memory_order_seq_cst) - side->count;
        if (there > side->size) return -EPROTO;
        if (there) {
            const uint64_t count = least(there, (uint64_t)size);
            const uint64_t at = side->count % side->size, first = least(side->size - at, count);
            memcpy(into, ring.bytes + at, first);
            memcpy(into + first, ring.bytes, count - first);
            side->count += count;
            side->effort = patience.effort;
            if (asleep) ring.reader_sleeps.store(0, std::memory_order_relaxed);
            ring.taken.store(side->count, std::memory_order_release);
            wake(ring.writer_sleeps, side->bell);
            return (int64_t)count;
        }
        if (asleep) {
            side->effort = patience.effort;
            return gone ? -EPIPE : 0;
        }
        if (patience.again()) continue;
        ring.reader_sleeps.store(1, std::memory_order_seq_cst);
        gone = !hush(side->bell);
        asleep = true;
    }
}

// Before a thread sleeps that waits for data, for room or for both, since the bell does not say for which it rang: whether
// one of them is there, or the other side has gone. Otherwise the bell tells.
int32_t shoal_ring_listen(Side* out, Side* into, int32_t for_data, int32_t for_room) {
    Ring &writes = *static_cast<Ring*>(out->ring), &reads = *static_cast<Ring*>(into->ring);
    if (for_data) reads.reader_sleeps.store(1, std::memory_order_seq_cst);
    if (for_room) writes.writer_sleeps.store(1, std::memory_order_seq_cst);
    if (!hush(into->bell)) return 1;
    if (for_data && reads.written.load(std::memory_order_seq_cst) != into->count) return 1;
    return for_room && out->count - writes.taken.load(std::memory_order_seq_cst) != out->size;
}
}
#pragma GCC visibility pop
