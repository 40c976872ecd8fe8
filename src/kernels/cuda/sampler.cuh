// What the sampler is made of: a row of the vocabulary shared by a cluster of blocks, reductions
// over it, the weights and the generator of src/engine/sampler.rs, and the search for thresholds.
//
// From sm_90 on a row belongs to a cluster of 8 blocks that read each other's shared memory; before
// it belongs to one block. sampler.cu describes the whole and has the entry points.
#pragma once

#include "common.cuh"

// Tests define CLUSTER to run the form for older GPUs on a new one.
#ifndef CLUSTER
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CLUSTER 8
#else
#define CLUSTER 1
#endif
#endif
#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

typedef unsigned long long u64;

constexpr int THREADS = 512;
constexpr int NUM_WARPS = THREADS / WARP_SIZE;
constexpr int NUM_BUCKETS = 2048;
constexpr uint32_t SKIPPED_ROW = 0xffffffffu;
constexpr uint32_t DROPPED_KEY = 0xffffffffu;
constexpr float GREEDY_TEMPERATURE = 1e-5f;
constexpr float MIN_TEMPERATURE = 1e-2f;
// Weights are summed as multiples of 2⁻²⁸, in two halves that cannot overflow 32 bits.
constexpr float WEIGHT_UNITS = 268435456.0f;
constexpr int HALF_BITS = 14;

struct Shared {
    u64 warps[NUM_WARPS];
    u64 exchange[2];
    u64 result;
    uint32_t low[NUM_BUCKETS];
    uint32_t high[NUM_BUCKETS];
    u64 bucket;
    u64 before;
};

__device__ __forceinline__ void sync_cluster() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Returns the address of a shared variable in block `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in(const void *variable, int rank) {
    uint32_t address = shared_address(variable);
#if CLUSTER > 1
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
#endif
    return address;
}
__device__ __forceinline__ u64 read_u64(uint32_t address) {
    u64 value;
#if CLUSTER > 1
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
#else
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
#endif
    return value;
}
__device__ __forceinline__ uint32_t read_u32(uint32_t address) {
    uint32_t value;
#if CLUSTER > 1
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
#else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
#endif
    return value;
}

__device__ __forceinline__ u64 to_bits(u64 value) { return value; }
__device__ __forceinline__ u64 to_bits(double value) { return __double_as_longlong(value); }
__device__ __forceinline__ void from_bits(u64 bits, u64 &value) { value = bits; }
__device__ __forceinline__ void from_bits(u64 bits, double &value) {
    value = __longlong_as_double(bits);
}

struct Max {
    __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};
struct Sum {
    __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

template <typename V, typename Op> __device__ __forceinline__ V warp_reduce(V value, Op op) {
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        value = op(value, __shfl_xor_sync(FULL_MASK, value, offset));
    }
    return value;
}

// Returns the sum of a value over the lanes up to the own.
template <typename V> __device__ __forceinline__ V warp_scan(V value) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
        const V other = __shfl_up_sync(FULL_MASK, value, offset);
        value += lane >= offset ? other : V();
    }
    return value;
}

// One row's work: this block's share of the vocabulary and what the cluster shares.
struct Row {
    Shared &shared;
    float *values;  // The share, in shared or global memory.
    int start;      // Its first token.
    int len;
    int rank;
    int parity;

    // Returns the reduction over the cluster, to every thread. Two exchange slots take turns, so
    // that one barrier of the cluster a reduction is enough.
    template <typename V, typename Op> __device__ V reduce(V value, Op op, V identity) {
        const int warp = threadIdx.x / WARP_SIZE;
        const int lane = threadIdx.x % WARP_SIZE;
        value = warp_reduce(value, op);
        if (lane == 0) {
            shared.warps[warp] = to_bits(value);
        }
        __syncthreads();
        if (warp == 0) {
            value = identity;
            if (lane < NUM_WARPS) {
                from_bits(shared.warps[lane], value);
            }
            value = warp_reduce(value, op);
            if (lane == 0) {
                shared.exchange[parity] = to_bits(value);
            }
        }
        sync_cluster();
        if (warp == 0) {
            value = identity;
            if (lane < CLUSTER) {
                from_bits(read_u64(address_in(&shared.exchange[parity], lane)), value);
            }
            value = warp_reduce(value, op);
            if (lane == 0) {
                shared.result = to_bits(value);
            }
        }
        __syncthreads();
        parity ^= 1;
        from_bits(shared.result, value);
        return value;
    }
};

// Calls visit(index, value) for each value of a share, 16 bytes at a time.
template <typename Visit>
__device__ __forceinline__ void for_each(const float *values, int len, Visit visit) {
    int i = 4 * threadIdx.x;
#pragma unroll 4
    for (; i + 3 < len; i += 4 * THREADS) {
        const float4 v = *reinterpret_cast<const float4 *>(values + i);
        visit(i, v.x);
        visit(i + 1, v.y);
        visit(i + 2, v.z);
        visit(i + 3, v.w);
    }
    for (; i < len; i++) {
        visit(i, values[i]);
    }
}

// Sets each value of a share to update(index, value). Ends with a barrier.
template <typename Update>
__device__ __forceinline__ void update_each(float *values, int len, Update update) {
    int i = 4 * threadIdx.x;
#pragma unroll 4
    for (; i + 3 < len; i += 4 * THREADS) {
        float4 v = *reinterpret_cast<float4 *>(values + i);
        v.x = update(i, v.x);
        v.y = update(i + 1, v.y);
        v.z = update(i + 2, v.z);
        v.w = update(i + 3, v.w);
        *reinterpret_cast<float4 *>(values + i) = v;
    }
    for (; i < len; i++) {
        values[i] = update(i, values[i]);
    }
    __syncthreads();
}

// Orders (logit, token): larger logits first, then lower tokens; what is not finite before all.
__device__ __forceinline__ u64 order_of(float logit, int token) {
    const uint32_t bits = __float_as_uint(logit);
    const uint32_t sortable = bits ^ ((int32_t)bits < 0 ? 0xffffffffu : 0x80000000u);
    const uint32_t first = logit < INFINITY ? sortable : 0xffffffffu;
    return (u64)first << 32 | (0xffffffffu - (uint32_t)token);
}
__device__ __forceinline__ int token_of(u64 order) { return 0xffffffffu - (uint32_t)order; }
__device__ __forceinline__ bool is_not_finite(u64 order) { return order >> 32 == 0xffffffffu; }
__device__ __forceinline__ float logit_of(u64 order) {
    const uint32_t sortable = order >> 32;
    return __uint_as_float(sortable ^ (sortable >> 31 ? 0x80000000u : 0xffffffffu));
}

// e^x for x ≤ 0, bit for bit as src/engine/sampler/select.rs: no products are fused with sums.
__device__ __forceinline__ float weight_of(float x) {
    const float clamped = x > -87.0f ? x : -87.0f;
    const float rounded = __fadd_rn(__fmul_rn(clamped, 1.44269504088896340736f), 12582912.0f);
    const float n = __fsub_rn(rounded, 12582912.0f);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)),
                              __fmul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float e_to_r = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    const uint32_t exponent = __float_as_uint(rounded) - __float_as_uint(12582912.0f);
    return x > -87.0f ? __fmul_rn(e_to_r, __uint_as_float((exponent + 127) << 23)) : 0.0f;
}

// Philox4x32-10; see src/engine/sampler/philox.rs.
__device__ __forceinline__ double uniform(u64 seed, u64 index) {
    uint32_t c0 = index, c1 = index >> 32, c2 = 0, c3 = 0;
    uint32_t k0 = seed, k1 = seed >> 32;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 first = (u64)0xd2511f53u * c0;
        const u64 second = (u64)0xcd9e8d57u * c2;
        c0 = (uint32_t)(second >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)second;
        c2 = (uint32_t)(first >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)first;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return (double)(((u64)c1 << 32 | c0) >> 11) * (1.0 / 9007199254740992.0);
}

// Distances from the best, in units of 2⁻²⁶; dropped tokens have none.
__device__ __forceinline__ uint32_t key_of(float distance) {
    if (!(distance < INFINITY)) {
        return DROPPED_KEY;
    }
    return distance < 63.99999f ? (uint32_t)(distance * 67108864.0f) : DROPPED_KEY - 1;
}

struct Bucket {
    int index;
    u64 before;
};

// Adds up the cluster's buckets and finds the one in which the running sum reaches `target`; if
// that is 0 it is first set to `fraction` of the whole sum. Every thread gets the bucket and the
// sum before it. Each block of the cluster scans its part of the buckets.
__device__ __forceinline__ Bucket find_bucket(Row &row, u64 &target, float fraction,
                                              bool of_mass) {
    constexpr int PART = NUM_BUCKETS / CLUSTER;
    constexpr int OWN = (PART + THREADS - 1) / THREADS;
    Shared &shared = row.shared;
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int first = threadIdx.x * OWN;
    u64 own[OWN] = {};
    u64 sum = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int bucket = row.rank * PART + first + i;
        for (int rank = 0; first + i < PART && rank < CLUSTER; rank++) {
            own[i] += read_u32(address_in(&shared.low[bucket], rank));
            if (of_mass) {
                own[i] += (u64)read_u32(address_in(&shared.high[bucket], rank)) << HALF_BITS;
            }
        }
        sum += own[i];
    }
    const u64 own_sum = sum;
    sum = warp_scan(sum);
    if (lane == WARP_SIZE - 1) {
        shared.warps[warp] = sum;
    }
    __syncthreads();
    u64 before = sum - own_sum;
    for (int other = 0; other < warp; other++) {
        before += shared.warps[other];
    }
    if (threadIdx.x == THREADS - 1) {
        shared.exchange[row.parity] = before + own_sum;
    }
    // Also: all blocks have read the buckets, which may now be cleared.
    sync_cluster();
    u64 parts[CLUSTER];
    u64 total = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) {
        parts[rank] = read_u64(address_in(&shared.exchange[row.parity], rank));
        total += parts[rank];
    }
    row.parity ^= 1;
    if (target == 0) {
        target = max((u64)1, min(total, (u64)ceil((double)fraction * (double)total)));
    }
    int owner = 0;
    u64 before_owner = 0;
    u64 running = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) {
        if (running < target && target <= running + parts[rank]) {
            owner = rank;
            before_owner = running;
        }
        running += parts[rank];
    }
    if (owner == row.rank) {
        before += before_owner;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (before < target && target <= before + own[i]) {
                shared.bucket = row.rank * PART + first + i;
                shared.before = before;
            }
            before += own[i];
        }
    }
    sync_cluster();
    return {(int)read_u64(address_in(&shared.bucket, owner)),
            read_u64(address_in(&shared.before, owner))};
}

// Returns the smallest key such that the tokens up to it are `count` (if > 0), or have `fraction`
// of the mass of all.
template <typename Distance>
__device__ uint32_t find_cutoff(Row &row, uint32_t count, float fraction, Distance distance) {
    Shared &shared = row.shared;
    const bool of_mass = count == 0;
    u64 target = count;
    uint32_t prefix = 0;
    const int shifts[3] = {21, 10, 0};
    for (int level = 0; level < 3; level++) {
        const int shift = shifts[level];
        const int bits = level == 2 ? 10 : 11;
        for (int i = threadIdx.x; i < NUM_BUCKETS; i += THREADS) {
            shared.low[i] = 0;
            shared.high[i] = 0;
        }
        __syncthreads();
        for_each(row.values, row.len, [&](int, float x) {
            const uint32_t key = x > -INFINITY ? key_of(distance(x)) : DROPPED_KEY;
            const bool is_inside = level == 0 || key >> (shift + bits) == prefix;
            if (key == DROPPED_KEY || !is_inside) {
                return;
            }
            const int bucket = key >> shift & ((1 << bits) - 1);
            if (!of_mass) {
                atomicAdd(&shared.low[bucket], 1);
                return;
            }
            const uint32_t weight = __float2uint_rn(weight_of(x) * WEIGHT_UNITS);
            if (weight != 0) {
                atomicAdd(&shared.low[bucket], weight & ((1 << HALF_BITS) - 1));
                atomicAdd(&shared.high[bucket], weight >> HALF_BITS);
            }
        });
        sync_cluster();
        const Bucket found = find_bucket(row, target, fraction, of_mass);
        prefix = prefix << bits | (uint32_t)found.index;
        target -= found.before;
    }
    return prefix;
}

template <typename Distance>
__device__ __forceinline__ void keep_up_to(Row &row, uint32_t cutoff, Distance distance) {
    update_each(row.values, row.len, [&](int, float x) {
        return x > -INFINITY && key_of(distance(x)) > cutoff ? -INFINITY : x;
    });
}
