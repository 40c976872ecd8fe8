// The products of gemm_small.cu and gemm_small_push.cu: a block's rows of W times up to 16 tokens.
//
// W is the left operand of m16n8k16 products, tokens are the columns of the right one. The order in
// which k is summed is free, so a thread takes 8 consecutive elements of a row of W (16 bytes) as
// its share of two products, and nobody else reads them. So shared memory serves each thread as a
// queue of its own loads, without any barrier: most of it is under way at any time, several times
// what bandwidth · latency asks for. Warps of a block take every w-th step of 128 elements of K and
// add up at the end. The queue is filled before wait_for_producer(): only x depends on other
// kernels.
#pragma once

#include "common.cuh"

constexpr int TILE_ROWS = 16;
constexpr int CHUNK = 32;  // Elements of K in two products.
constexpr int CHUNKS = 4;
constexpr int STEP = CHUNK * CHUNKS;  // Elements of K that a warp takes at a time.

// A form: tiles of 16 rows of a block, its warps, and how many steps a warp's queue holds.
template <int TILES_, int WARPS_, int STAGES_> struct Form {
    static constexpr int TILES = TILES_;
    static constexpr int WARPS = WARPS_;
    static constexpr int STAGES = STAGES_;
    static constexpr int STAGE_BYTES = TILES * TILE_ROWS * STEP * 2;
    static constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
};

using Wide = Form<1, 8, 2>;
using Deep = Form<1, 8, 3>;
using R32 = Form<2, 4, 2>;

// A thread's two rows of each tile, null where W has none.
template <typename T, int TILES> struct Rows {
    const T *low[TILES];
    const T *high[TILES];
};

// The block's rows of W from first_row on.
template <typename T, int TILES>
__device__ __forceinline__ Rows<T, TILES> rows_from(const T *weight, int first_row, int num_rows,
                                                    int num_columns) {
    Rows<T, TILES> rows;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int row = first_row + tile * TILE_ROWS + threadIdx.x % WARP_SIZE / 4;
        const T *low = weight + (int64_t)row * num_columns;
        rows.low[tile] = row < num_rows ? low : nullptr;
        rows.high[tile] = row + 8 < num_rows ? low + 8 * (int64_t)num_columns : nullptr;
    }
    return rows;
}

// Starts the copies of one step's share of W.
template <typename T, int TILES>
__device__ __forceinline__ void copy_weights(uint32_t stage, const Rows<T, TILES> &rows,
                                             const T *somewhere, int column, int num_columns) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int place = column + chunk * CHUNK;
            const bool has_low = rows.low[tile] != nullptr && place < num_columns;
            const bool has_high = rows.high[tile] != nullptr && place < num_columns;
            const uint32_t target = stage + (tile * CHUNKS + chunk) * 2 * 16 * WARP_SIZE;
            copy16_async(target, has_low ? rows.low[tile] + place : somewhere, has_low);
            copy16_async(target + 16 * WARP_SIZE, has_high ? rows.high[tile] + place : somewhere,
                         has_high);
        }
    }
}

__device__ __forceinline__ uint4 read_shared16(uint32_t address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
}

template <typename T, int TOKEN_TILES>
__device__ __forceinline__ void load_tokens(uint4 (&x)[TOKEN_TILES][CHUNKS],
                                            const T *const (&rows)[TOKEN_TILES], int column,
                                            int num_columns) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int place = column + chunk * CHUNK;
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            const bool is_there = rows[tile] != nullptr && place < num_columns;
            x[tile][chunk] = is_there ? load16(rows[tile] + place) : make_uint4(0, 0, 0, 0);
        }
    }
}

struct Nothing {
    __device__ __forceinline__ void operator()() const {}
};

// Sums the block's rows of W over all of K, and returns where the sums of warp 0 lie:
// [row][token], each further warp's Form::WARP_BYTES later. Ends with a barrier. `after_wait` may
// start loads of what other kernels have written.
template <typename T, typename Form, int TOKEN_TILES, typename AfterWait = Nothing>
__device__ __forceinline__ const char *block_product(const Rows<T, Form::TILES> &rows,
                                                     const T *weight, const T *x, int num_tokens,
                                                     int num_columns, AfterWait after_wait = {}) {
    extern __shared__ __align__(128) char queues[];
    constexpr int TILES = Form::TILES;
    constexpr int WARPS = Form::WARPS;
    constexpr int TOKENS = 8 * TOKEN_TILES;
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int group = lane / 4;
    const int pair = lane % 4;
    char *queue = queues + warp * Form::WARP_BYTES;
    const uint32_t first_stage = shared_address(queue) + 16 * lane;
    const uint32_t last_stage = first_stage + (Form::STAGES - 1) * Form::STAGE_BYTES;

    int copied = warp * STEP + 8 * pair;
#pragma unroll
    for (int stage = 0; stage < Form::STAGES - 1; stage++) {
        copy_weights(first_stage + stage * Form::STAGE_BYTES, rows, weight, copied, num_columns);
        commit_copies();
        copied += WARPS * STEP;
    }
    wait_for_producer();
    release_consumer();
    after_wait();
    const T *token_rows[TOKEN_TILES];
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; tile++) {
        const int token = 8 * tile + group;
        token_rows[tile] = token < num_tokens ? x + (int64_t)token * num_columns : nullptr;
    }
    int column = warp * STEP + 8 * pair;
    uint4 next[TOKEN_TILES][CHUNKS];
    load_tokens<T, TOKEN_TILES>(next, token_rows, column, num_columns);
    float acc[TILES][TOKEN_TILES][4] = {};
    uint32_t read = first_stage;
    uint32_t write = last_stage;
    while (column - 8 * pair < num_columns) {
        wait_for_copies<Form::STAGES - 2>();
        uint4 tokens[TOKEN_TILES][CHUNKS];
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                tokens[tile][chunk] = next[tile][chunk];
            }
        }
        column += WARPS * STEP;
        load_tokens<T, TOKEN_TILES>(next, token_rows, column, num_columns);
        // Into the stage that the previous round has read.
        copy_weights(write, rows, weight, copied, num_columns);
        commit_copies();
        copied += WARPS * STEP;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint32_t source = read + (tile * CHUNKS + chunk) * 2 * 16 * WARP_SIZE;
                const uint4 a = read_shared16(source);
                const uint4 b = read_shared16(source + 16 * WARP_SIZE);
#pragma unroll
                for (int token = 0; token < TOKEN_TILES; token++) {
                    const uint4 t = tokens[token][chunk];
                    mma<T>(acc[tile][token], a.x, b.x, a.y, b.y, t.x, t.y);
                    mma<T>(acc[tile][token], a.z, b.z, a.w, b.w, t.z, t.w);
                }
            }
        }
        write = read;
        read = read == last_stage ? first_stage : read + Form::STAGE_BYTES;
    }
    wait_for_copies<0>();
    // Each warp's sums take the place of its queue, once all its lanes are done with that.
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int token = 0; token < TOKEN_TILES; token++) {
            float *sums = reinterpret_cast<float *>(queue) + 8 * token + 2 * pair;
            float *low = sums + (tile * TILE_ROWS + group) * TOKENS;
            *reinterpret_cast<float2 *>(low) =
                make_float2(acc[tile][token][0], acc[tile][token][1]);
            *reinterpret_cast<float2 *>(low + 8 * TOKENS) =
                make_float2(acc[tile][token][2], acc[tile][token][3]);
        }
    }
    __syncthreads();
    return queues;
}

// Returns one output's sum over the warps.
template <typename Form>
__device__ __forceinline__ float sum_of_warps(const char *queues, int index) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Form::WARPS; warp++) {
        sum += reinterpret_cast<const float *>(queues + warp * Form::WARP_BYTES)[index];
    }
    return sum;
}
