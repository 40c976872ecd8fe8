// all_reduce, all_reduce_two_shot: out = Σ over ranks of x, the same bits on all ranks;
// all_reduce_add_rms_norm, all_reduce_two_shot_add_rms_norm: sum = residual + Σ x,
// out = rms_norm(sum) · weight, bit for bit what add_rms_norm_wide (norm.cu) makes of Σ x in blocks of
// as many threads.
//
// Shapes:  x, out: num_vectors · 8 elements, any shape; the norms: x, residual, out, sum
//          [rows, width], weight [width]; type T, row-major. All are this rank's own and may lie
//          anywhere in its memory: only the workspaces (peers.cuh) are seen by other ranks. Adds
//          in f32 in the order of ranks, rounds Σ to T once. `out` may be `x`, `sum` may be
//          `residual`.
// Names:   all_reduce{,_two_shot}{,_add_rms_norm}_{f16,bf16}_r{2,3,4,6,8}: how many ranks. One
//          shot: each rank sends all of x to every other; for small messages. Two shots: a rank
//          adds up its share, a part of the vectors or rows, and sends the sum to all.
//          all_reduce_pushed_add_rms_norm_…: one shot of what gemm_small_push has sent already.
// Launch:  grid at most MAX_BLOCKS and no more blocks than the GPU holds at once, the same on all
//          ranks. Reductions: any block up to 512. Norms: grid up to rows, block a multiple of
//          32, at most 512 and at least width / 32.
// Slot:    slot_bytes at least: one shot ranks · bytes of x; two shots 2 · bytes + 16 · ranks, the
//          norms 2 · bytes + ranks · bytes of a row.
// Limits:  num_vectors at least 1; two shots: num_vectors (the norms: rows) at least ranks. width
//          a multiple of 8, at most 16,384; pointers on 16 bytes.
// Method:  own. All of a block's sends come before its first wait. Blocks do not depend on each
//          other, and block b of a rank waits only for blocks b of others.
#include "norm.cuh"
#include "peers.cuh"

constexpr int MAX_VECTORS = 4;

// The first item of a rank's share of `count`.
template <int WORLD> __device__ __forceinline__ int first_of(int rank, int count) {
    return (int64_t)count * rank / WORLD;
}
// The largest share.
template <int WORLD> __device__ __forceinline__ int largest_share(int count) {
    return (count + WORLD - 1) / WORLD;
}

template <typename T>
__device__ __forceinline__ uint4 load_presentable(const T *x, int64_t vector) {
    return presentable(load16(x + 8 * vector));
}

template <typename T, int WORLD>
__device__ __forceinline__ void one_shot(T *out, const T *x, int num_vectors,
                                         const Peers &peers) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int stride = gridDim.x * blockDim.x;
    wait_for_producer();
    release_consumer();
    // Under way together with the epoch. Most often it is all that the thread has.
    const uint4 head = first < num_vectors ? load_presentable(x, first) : uint4{};
    const uint32_t epoch = read_epoch(peers);
    const int64_t slot = slot_of(peers, epoch);
    const int64_t part = 16 * (int64_t)num_vectors;
    char *received = peers.workspaces[peers.rank] + slot;
    const auto own = [&](int vector) {
        return vector == first ? head : load_presentable(x, vector);
    };
    for (int vector = first; vector < num_vectors; vector += stride) {
        push_to_all<WORLD>(peers, slot + peers.rank * part + 16 * (int64_t)vector, own(vector));
    }
    for (int vector = first; vector < num_vectors; vector += stride) {
        const uint4 sum =
            receive_sum<T, WORLD>(own(vector), received + 16 * (int64_t)vector, part, peers);
        store16(out + 8 * (int64_t)vector, sum);
    }
    __syncthreads();
    advance_epoch(peers, epoch);
}

// The slot: what others send of this rank's share, [ranks][largest share], then the sums of all.
template <typename T, int WORLD>
__device__ __forceinline__ void two_shot(T *out, const T *x, int num_vectors,
                                         const Peers &peers) {
    wait_for_producer();
    release_consumer();
    const uint32_t epoch = read_epoch(peers);
    const int64_t slot = slot_of(peers, epoch);
    const int64_t part = 16 * (int64_t)largest_share<WORLD>(num_vectors);
    const int64_t sums = slot + WORLD * part;
    char *workspace = peers.workspaces[peers.rank];
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int stride = gridDim.x * blockDim.x;
#pragma unroll
    for (int step = 1; step < WORLD; step++) {
        const int owner = rank_after<WORLD>(peers, step);
        const int begin = first_of<WORLD>(owner, num_vectors);
        const int count = first_of<WORLD>(owner + 1, num_vectors) - begin;
        char *target = peers.workspaces[owner] + slot + peers.rank * part;
        for (int i = thread; i < count; i += stride) {
            store_system16(target + 16 * (int64_t)i, load_presentable(x, begin + i));
        }
    }
    const int begin = first_of<WORLD>(peers.rank, num_vectors);
    const int count = first_of<WORLD>(peers.rank + 1, num_vectors) - begin;
    for (int i = thread; i < count; i += stride) {
        const int64_t vector = begin + i;
        const uint4 own = load_presentable(x, vector);
        const uint4 sum =
            receive_sum<T, WORLD>(own, workspace + slot + 16 * (int64_t)i, part, peers);
        push_to_all<WORLD>(peers, sums + 16 * vector, sum);
        store16(out + 8 * vector, sum);
    }
#pragma unroll
    for (int step = 1; step < WORLD; step++) {
        const int owner = rank_after<WORLD>(peers, step);
        const int64_t end = first_of<WORLD>(owner + 1, num_vectors);
        for (int64_t vector = first_of<WORLD>(owner, num_vectors) + thread; vector < end;
             vector += stride) {
            store16(out + 8 * vector, receive(workspace + sums + 16 * vector, peers, owner));
        }
    }
    __syncthreads();
    advance_epoch(peers, epoch);
}

template <typename T> struct NormArgs {
    T *out;
    T *sum;
    const T *x;
    const T *residual;
    const T *weight;
    float eps;
    int rows;
    int width;
};

template <typename T, int WORLD, bool IS_PUSHED = false>
__device__ __forceinline__ void one_shot_norm(const NormArgs<T> &args, const Peers &peers) {
    const int num_vectors = args.width / 8;
    const bool has_head = blockIdx.x < args.rows && threadIdx.x < num_vectors;
    const int64_t first = (int64_t)blockIdx.x * num_vectors + threadIdx.x;
    uint4 weights[MAX_VECTORS];
    load_weights(weights, args.weight, num_vectors);
    wait_for_producer();
    release_consumer();
    const uint4 head = has_head ? load_presentable(args.x, first) : uint4{};
    const uint32_t epoch = read_epoch(peers);
    const int64_t slot = slot_of(peers, epoch);
    const int64_t part = 16 * (int64_t)args.rows * num_vectors;
    char *received = peers.workspaces[peers.rank] + slot;
    const auto own = [&](int64_t vector) {
        return vector == first ? head : load_presentable(args.x, vector);
    };
    for (int row = blockIdx.x; !IS_PUSHED && row < args.rows; row += gridDim.x) {
        for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
            const int64_t vector = (int64_t)row * num_vectors + i;
            push_to_all<WORLD>(peers, slot + peers.rank * part + 16 * vector, own(vector));
        }
    }
    for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const int64_t row_vector = (int64_t)row * num_vectors;
        const int64_t at = 8 * row_vector;
        const auto source = [&](int i) {
            const int64_t vector = row_vector + i;
            return receive_sum<T, WORLD>(own(vector), received + 16 * vector, part, peers);
        };
        norm_row<T, true>(args.out + at, args.sum + at, source, args.residual + at, weights,
                          args.eps, num_vectors);
    }
    __syncthreads();
    advance_epoch(peers, epoch);
}

// one_shot_norm after a kernel that has sent x.
template <typename T, int WORLD>
__device__ __forceinline__ void pushed_norm(const NormArgs<T> &args, const Peers &peers) {
    one_shot_norm<T, WORLD, true>(args, peers);
}

// The first row from `begin` on that is this block's: row r is block r % grid's.
__device__ __forceinline__ int first_row(int begin) {
    const int block = begin % gridDim.x;
    return begin + blockIdx.x - block + (blockIdx.x < block ? gridDim.x : 0);
}

// The slot is two_shot's, with rows as the items that are shared out.
template <typename T, int WORLD>
__device__ __forceinline__ void two_shot_norm(const NormArgs<T> &args, const Peers &peers) {
    const int num_vectors = args.width / 8;
    uint4 weights[MAX_VECTORS];
    load_weights(weights, args.weight, num_vectors);
    wait_for_producer();
    release_consumer();
    const uint32_t epoch = read_epoch(peers);
    const int64_t slot = slot_of(peers, epoch);
    const int64_t part = 16 * (int64_t)largest_share<WORLD>(args.rows) * num_vectors;
    const int64_t sums = slot + WORLD * part;
    char *workspace = peers.workspaces[peers.rank];
#pragma unroll
    for (int step = 1; step < WORLD; step++) {
        const int owner = rank_after<WORLD>(peers, step);
        const int begin = first_of<WORLD>(owner, args.rows);
        const int end = first_of<WORLD>(owner + 1, args.rows);
        char *target = peers.workspaces[owner] + slot + peers.rank * part;
        for (int row = first_row(begin); row < end; row += gridDim.x) {
            for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
                store_system16(target + 16 * ((int64_t)(row - begin) * num_vectors + i),
                               load_presentable(args.x, (int64_t)row * num_vectors + i));
            }
        }
    }
    // Its own rows first: the others wait for them.
    for (int step = 0; step < WORLD; step++) {
        const int owner = rank_after<WORLD>(peers, step);
        const int begin = first_of<WORLD>(owner, args.rows);
        const int end = first_of<WORLD>(owner + 1, args.rows);
        for (int row = first_row(begin); row < end; row += gridDim.x) {
            const int64_t row_vector = (int64_t)row * num_vectors;
            const int64_t at = 8 * row_vector;
            const auto source = [&](int i) {
                const int64_t place = sums + 16 * (row_vector + i);
                if (step > 0) {
                    return receive(workspace + place, peers, owner);
                }
                const uint4 own = load_presentable(args.x, row_vector + i);
                const int64_t index = (int64_t)(row - begin) * num_vectors + i;
                const uint4 sum =
                    receive_sum<T, WORLD>(own, workspace + slot + 16 * index, part, peers);
                push_to_all<WORLD>(peers, place, sum);
                return sum;
            };
            norm_row<T, true>(args.out + at, args.sum + at, source, args.residual + at, weights,
                              args.eps, num_vectors);
        }
    }
    __syncthreads();
    advance_epoch(peers, epoch);
}

#define REDUCTION(T, SUFFIX, WORLD, NAME, METHOD)                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                              \
        NAME##_##SUFFIX##_r##WORLD(T *out, const T *x, int num_vectors,                            \
                                   const __grid_constant__ Peers peers) {                          \
        METHOD<T, WORLD>(out, x, num_vectors, peers);                                              \
    }
#define NORM(T, SUFFIX, WORLD, NAME, METHOD)                                                       \
    extern "C" __global__ void __launch_bounds__(512)                                              \
        NAME##_add_rms_norm_##SUFFIX##_r##WORLD(T *out, T *sum, const T *x, const T *residual,     \
                                                const T *weight, float eps, int rows, int width,   \
                                                const __grid_constant__ Peers peers) {             \
        METHOD<T, WORLD>({out, sum, x, residual, weight, eps, rows, width}, peers);                \
    }
#define ENTRIES(T, SUFFIX, WORLD)                                                                  \
    REDUCTION(T, SUFFIX, WORLD, all_reduce, one_shot)                                              \
    REDUCTION(T, SUFFIX, WORLD, all_reduce_two_shot, two_shot)                                     \
    NORM(T, SUFFIX, WORLD, all_reduce, one_shot_norm)                                              \
    NORM(T, SUFFIX, WORLD, all_reduce_two_shot, two_shot_norm)                                     \
    NORM(T, SUFFIX, WORLD, all_reduce_pushed, pushed_norm)
#define RANKS(T, SUFFIX)                                                                           \
    ENTRIES(T, SUFFIX, 2)                                                                          \
    ENTRIES(T, SUFFIX, 3)                                                                          \
    ENTRIES(T, SUFFIX, 4)                                                                          \
    ENTRIES(T, SUFFIX, 6)                                                                          \
    ENTRIES(T, SUFFIX, 8)

RANKS(__half, f16)
RANKS(__nv_bfloat16, bf16)
