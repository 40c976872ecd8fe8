// How kernels of several GPUs hand data to each other through memory that all of them can write.
//
// Every rank owns a workspace, a plain allocation of its GPU that all ranks map at one address
// (peer access), and passes all of them to each launch. All ranks launch the same collectives with
// the same sizes in the same order; which of them starts first does not matter.
//
//   bytes 0 ..              counters u32 [MAX_BLOCKS], the rank's own
//   START_FLAGS, END_FLAGS  u32 [MAX_BLOCKS][MAX_RANKS], written by the rank of that column
//   SLOTS ..                two slots of slot_bytes each
//
// The whole workspace is filled with 0xff once, before any rank's first launch; nothing is ever
// reset. Element k of the counters tells how many collectives the rank has finished (from -1 on):
// block b keeps those of b, b + grid, ..., so that all of them advance by one in each launch,
// whatever its grid. That count is the epoch, the same on all ranks in the same collective.
//
// Data carries its own arrival: a sender stores 16 bytes at a time into the slot epoch % 2 of the
// receiver, who reads them until no 32-bit word is ABSENT, takes them and stores ABSENT again. No
// fence, flag or barrier comes between, so an exchange takes one way over the link. Two slots are
// enough: a rank is past epoch n only after it has heard from every other in epoch n, and what it
// hears was sent after the sender's kernels up to epoch n - 1 had ended, their slot all ABSENT
// again. So it may write that slot in epoch n + 1. (Every collective must therefore let every rank
// hear from every other.) ABSENT is a pair of NaNs that no arithmetic produces (its NaNs are
// 0x7fff); senders replace it.
//
// A rank that waits longer than timeout_ns, or finds *error set, stops waiting: it sets *error to
// 1 + the rank it misses if it is 0, and the kernel ends with wrong results. The workspaces are
// then of no use any more.
#pragma once

#include "common.cuh"

constexpr int MAX_RANKS = 8;
constexpr int MAX_BLOCKS = 256;  // Of a launch; at most as many as the GPU holds at once.
constexpr int64_t START_FLAGS = 4096;
constexpr int64_t END_FLAGS = START_FLAGS + 4 * MAX_BLOCKS * MAX_RANKS;
constexpr int64_t SLOTS = 32768;
constexpr uint32_t ABSENT = 0xffffffffu;
constexpr uint32_t NAN_PAIR = 0x7fff7fffu;
constexpr uint32_t POLLS_PER_CHECK = 1024;

struct Peers {
    char *workspaces[MAX_RANKS];  // Of all ranks; unused ones null.
    uint32_t *error;              // In host memory that the GPU can write; 0 while all is well.
    uint64_t timeout_ns;
    int64_t slot_bytes;  // A multiple of 16.
    int rank;
    int world_size;
};

// Accesses that other GPUs see: in one piece for each 32-bit word, and never from L1.
__device__ __forceinline__ uint4 load_system16(const void *source) {
    uint4 value;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
    return value;
}
__device__ __forceinline__ void store_system16(void *target, uint4 value) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w));
}
__device__ __forceinline__ uint32_t load_system(const void *source) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(source));
    return value;
}
__device__ __forceinline__ void store_system(void *target, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(target), "r"(value));
}

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Returns how many collectives came before this one. The block needs a barrier between this call
// of all its threads and advance_epoch().
__device__ __forceinline__ uint32_t read_epoch(const Peers &peers) {
    return load_system(peers.workspaces[peers.rank] + 4 * blockIdx.x) + 1;
}

// Returns the epoch of the next collective, to a kernel that sends for it ahead of it.
__device__ __forceinline__ uint32_t read_next_epoch(const Peers &peers) {
    return load_system(peers.workspaces[peers.rank]) + 1;
}

__device__ __forceinline__ void advance_epoch(const Peers &peers, uint32_t epoch) {
    char *counters = peers.workspaces[peers.rank];
    for (int i = blockIdx.x + threadIdx.x * gridDim.x; i < MAX_BLOCKS;
         i += blockDim.x * gridDim.x) {
        store_system(counters + 4 * i, epoch);
    }
}

// Returns where the epoch's slot begins in every workspace.
__device__ __forceinline__ int64_t slot_of(const Peers &peers, uint32_t epoch) {
    return SLOTS + (epoch & 1) * peers.slot_bytes;
}

// One wait of a thread.
struct Wait {
    uint32_t polls = 0;
    uint64_t since = 0;
};

// Returns whether to stop waiting for `missing`; looks only now and then.
__device__ __forceinline__ bool gives_up(Wait &wait, const Peers &peers, int missing) {
    wait.polls += 1;
    if (wait.polls % POLLS_PER_CHECK != 0) {
        return false;
    }
    if (load_system(peers.error) != 0) {
        return true;
    }
    const uint64_t now = nanoseconds();
    if (wait.since == 0) {
        wait.since = now;
    }
    if (now - wait.since < peers.timeout_ns) {
        return false;
    }
    store_system(peers.error, 1 + missing);
    return true;
}

__device__ __forceinline__ bool has_arrived(uint4 value) {
    return value.x != ABSENT && value.y != ABSENT && value.z != ABSENT && value.w != ABSENT;
}

// Returns the value with NaNs that look like ABSENT replaced.
__device__ __forceinline__ uint32_t presentable(uint32_t value) {
    return value == ABSENT ? NAN_PAIR : value;
}
__device__ __forceinline__ uint4 presentable(uint4 value) {
    return make_uint4(presentable(value.x), presentable(value.y), presentable(value.z),
                      presentable(value.w));
}

// Returns the rank `step` after this one; all ranks begin with another receiver.
template <int WORLD> __device__ __forceinline__ int rank_after(const Peers &peers, int step) {
    const int rank = peers.rank + step;
    return rank < WORLD ? rank : rank - WORLD;
}

// Stores a presentable value at `offset` of all other ranks' workspaces.
template <int WORLD>
__device__ __forceinline__ void push_to_all(const Peers &peers, int64_t offset, uint4 value) {
#pragma unroll
    for (int step = 1; step < WORLD; step++) {
        store_system16(peers.workspaces[rank_after<WORLD>(peers, step)] + offset, value);
    }
}

// Takes what `source` has stored at `place`.
__device__ __forceinline__ uint4 receive(char *place, const Peers &peers, int source) {
    Wait wait;
    uint4 value = load_system16(place);
    while (!has_arrived(value) && !gives_up(wait, peers, source)) {
        value = load_system16(place);
    }
    store_system16(place, make_uint4(ABSENT, ABSENT, ABSENT, ABSENT));
    return value;
}

// Takes what rank r has stored at place + r · stride, for all other ranks, and returns the sum with
// `own` (presentable). Adds in the order of ranks, so that all ranks get the same bits, and rounds
// once.
template <typename T, int WORLD>
__device__ __forceinline__ uint4 receive_sum(uint4 own, char *place, int64_t stride,
                                             const Peers &peers) {
    uint4 parts[WORLD];
    Wait wait;
    int missing;
    do {
#pragma unroll
        for (int rank = 0; rank < WORLD; rank++) {
            parts[rank] = rank == peers.rank ? own : load_system16(place + rank * stride);
        }
        missing = -1;
#pragma unroll
        for (int rank = 0; rank < WORLD; rank++) {
            missing = has_arrived(parts[rank]) ? missing : rank;
        }
    } while (missing >= 0 && !gives_up(wait, peers, missing));
    float sum[8];
    unpack8<T>(parts[0], sum);
#pragma unroll
    for (int rank = 1; rank < WORLD; rank++) {
        float values[8];
        unpack8<T>(parts[rank], values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[i] += values[i];
        }
    }
#pragma unroll
    for (int rank = 0; rank < WORLD; rank++) {
        if (rank != peers.rank) {
            store_system16(place + rank * stride, make_uint4(ABSENT, ABSENT, ABSENT, ABSENT));
        }
    }
    return pack8<T>(sum);
}
