// all_gather_columns: joins the columns that the ranks hold, e.g. of the logits.
//
// Shapes:  x [rows, width] f32, this rank's; out [rows, ranks · width] f32, rank r's at column
//          r · width. Any subset of the ranks gets it.
// Parameters: outs.rows[r] is rank r's output in memory that this rank can write, or null where r
//          takes none; the same on all ranks.
// Launch:  grid at most MAX_BLOCKS and no more blocks than the GPU holds at once, the same on all
//          ranks; block at least ranks.
// Limits:  width a multiple of 4, rows · width / 4 under 2^31; pointers on 16 bytes.
// Method:  own. Each rank stores its columns straight into the outputs: all blocks b of the ranks
//          wait for each other, so that the outputs' readers are done (they come earlier in their
//          streams), store, and tell the takers, who wait. Uses the workspaces' flags (peers.cuh).
#include "peers.cuh"

struct Outputs {
    float *rows[MAX_RANKS];
};

// Tells `rank` that this block has come to `epoch`, with all that it has stored before.
__device__ __forceinline__ void raise_flag(const Peers &peers, int rank, int64_t flags,
                                           uint32_t epoch) {
    char *flag =
        peers.workspaces[rank] + flags + 4 * (blockIdx.x * MAX_RANKS + (int64_t)peers.rank);
    __threadfence_system();
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
}

// Waits until block blockIdx.x of `rank` has come to `epoch`.
__device__ __forceinline__ void await_flag(const Peers &peers, int rank, int64_t flags,
                                           uint32_t epoch) {
    const char *flag = peers.workspaces[peers.rank] + flags +
                       4 * (blockIdx.x * MAX_RANKS + (int64_t)rank);
    Wait wait;
    uint32_t seen;
    do {
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        // Epochs wrap around, so it is their difference that counts.
    } while ((int32_t)(seen - epoch) < 0 && !gives_up(wait, peers, rank));
}

extern "C" __global__ void __launch_bounds__(1024)
    all_gather_columns(const float *x, int rows, int width, const __grid_constant__ Outputs outs,
                       const __grid_constant__ Peers peers) {
    wait_for_producer();
    release_consumer();
    const uint32_t epoch = read_epoch(peers);
    const int rank = threadIdx.x;
    const bool has_peer = rank < peers.world_size && rank != peers.rank;
    if (has_peer) {
        raise_flag(peers, rank, START_FLAGS, epoch);
        await_flag(peers, rank, START_FLAGS, epoch);
    }
    __syncthreads();
    const int row_vectors = width / 4;
    const int num_vectors = rows * row_vectors;
    const int64_t out_width = (int64_t)peers.world_size * width;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_vectors;
         i += gridDim.x * blockDim.x) {
        const int row = i / row_vectors;
        const int column = peers.rank * width + 4 * (i - row * row_vectors);
        const uint4 value = load16(x + 4 * (int64_t)i);
        for (int target = 0; target < peers.world_size; target++) {
            if (outs.rows[target] != nullptr) {
                store16(outs.rows[target] + row * out_width + column, value);
            }
        }
    }
    __syncthreads();
    if (has_peer && outs.rows[rank] != nullptr) {
        raise_flag(peers, rank, END_FLAGS, epoch);
    }
    if (has_peer && outs.rows[peers.rank] != nullptr) {
        await_flag(peers, rank, END_FLAGS, epoch);
    }
    advance_epoch(peers, epoch);
}
