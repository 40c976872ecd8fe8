// gemm_small: y = x Wᵀ (+ bias) (+ residual) for up to 16 rows of x, as fast as memory gives W.
//
// Shapes:  x [num_tokens, K], W [N, K] as checkpoints store it, bias [N] or null, residual and
//          out [num_tokens, N]; type T, row-major; the _f32out forms write f32 (logits) and take
//          no residual. `residual` may be `out`.
//          gemm_small_silu: W [2 N, K], gates before ups; out [num_tokens, N] =
//          silu(x Gᵀ) · (x Uᵀ); without bias and residual.
// Names:   gemm_small{,_silu}_{f16,bf16}{,_f32out}_t{8,16}_w{4,8}: at most 8 or 16 tokens, 4 or 8
//          warps. More warps split K finer: better for a long K (Qwen2.5-7B: the down product).
// Launch:  grid (⌈N / 16⌉), silu (⌈N / 8⌉); block (32 · warps); dynamic shared memory 65,536
//          bytes for w4, 98,304 for w8 (needs the opt-in).
// Limits:  num_tokens from 1 to 8 or 16; K a multiple of 8; pointers on 16 bytes.
// Method:  own. W is the left operand of m16n8k16 products, tokens are the columns of the right
//          one. The order in which k is summed is free, so a thread takes 8 consecutive elements
//          of a row of W (16 bytes) as its share of two products, and nobody else reads them. So
//          shared memory serves each thread as a queue of its own loads, without any barrier:
//          most of it is under way at any time, several times what bandwidth · latency asks for.
//          Warps of a block take every w-th step of 128 elements of K and add up at the end. The
//          queue is filled before wait_for_producer(): only x depends on other kernels.
#include "common.cuh"

constexpr int TILE_ROWS = 16;
constexpr int CHUNK = 32;  // Elements of K in two products.
constexpr int CHUNKS = 4;
constexpr int STEP = CHUNK * CHUNKS;  // Elements of K that a warp takes at a time.
constexpr int STAGE_BYTES = TILE_ROWS * STEP * 2;

template <int WARPS> struct Queue {
    static constexpr int STAGES = WARPS == 4 ? 4 : 3;
    static constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
};

// Starts the copies of one step's share of W: rows `low` and `high`, null where N has none.
template <typename T>
__device__ __forceinline__ void copy_weights(uint32_t stage, const T *low, const T *high,
                                             const T *somewhere, int column, int num_columns) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int place = column + chunk * CHUNK;
        const bool has_low = low != nullptr && place < num_columns;
        const bool has_high = high != nullptr && place < num_columns;
        const uint32_t target = stage + chunk * 2 * 16 * WARP_SIZE;
        copy16_async(target, has_low ? low + place : somewhere, has_low);
        copy16_async(target + 16 * WARP_SIZE, has_high ? high + place : somewhere, has_high);
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

// Sums rows `low` and `high` (each thread's own) of W over all of K, and returns where the sums
// of warp 0 lie: [row][token], each further warp's Queue::WARP_BYTES later. Ends with a barrier.
template <typename T, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ const char *block_product(const T *low, const T *high, const T *weight,
                                                     const T *x, int num_tokens,
                                                     int num_columns) {
    extern __shared__ __align__(128) char queues[];
    constexpr int STAGES = Queue<WARPS>::STAGES;
    constexpr int TOKENS = 8 * TOKEN_TILES;
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int group = lane / 4;
    const int pair = lane % 4;
    char *queue = queues + warp * Queue<WARPS>::WARP_BYTES;
    const uint32_t first_stage = shared_address(queue) + 16 * lane;

    int copied = warp * STEP + 8 * pair;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        copy_weights(first_stage + stage * STAGE_BYTES, low, high, weight, copied, num_columns);
        commit_copies();
        copied += WARPS * STEP;
    }
    wait_for_producer();
    release_consumer();
    const T *token_rows[TOKEN_TILES];
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; tile++) {
        const int token = 8 * tile + group;
        token_rows[tile] = token < num_tokens ? x + (int64_t)token * num_columns : nullptr;
    }
    int column = warp * STEP + 8 * pair;
    uint4 next[TOKEN_TILES][CHUNKS];
    load_tokens<T, TOKEN_TILES>(next, token_rows, column, num_columns);
    float acc[TOKEN_TILES][4] = {};
    uint32_t read = first_stage;
    uint32_t write = first_stage + (STAGES - 1) * STAGE_BYTES;
    while (column - 8 * pair < num_columns) {
        wait_for_copies<STAGES - 2>();
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
        copy_weights(write, low, high, weight, copied, num_columns);
        commit_copies();
        copied += WARPS * STEP;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const uint4 a = read_shared16(read + chunk * 2 * 16 * WARP_SIZE);
            const uint4 b = read_shared16(read + (chunk * 2 + 1) * 16 * WARP_SIZE);
#pragma unroll
            for (int tile = 0; tile < TOKEN_TILES; tile++) {
                const uint4 t = tokens[tile][chunk];
                mma<T>(acc[tile], a.x, b.x, a.y, b.y, t.x, t.y);
                mma<T>(acc[tile], a.z, b.z, a.w, b.w, t.z, t.w);
            }
        }
        write = read;
        read = read == first_stage + (STAGES - 1) * STAGE_BYTES ? first_stage : read + STAGE_BYTES;
    }
    wait_for_copies<0>();
    // Each warp's sums take the place of its queue, once all its lanes are done with that.
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; tile++) {
        float *sums = reinterpret_cast<float *>(queue) + 8 * tile + 2 * pair;
        *reinterpret_cast<float2 *>(sums + group * TOKENS) =
            make_float2(acc[tile][0], acc[tile][1]);
        *reinterpret_cast<float2 *>(sums + (group + 8) * TOKENS) =
            make_float2(acc[tile][2], acc[tile][3]);
    }
    __syncthreads();
    return queues;
}

// Returns one output's sum over the warps.
template <int WARPS>
__device__ __forceinline__ float sum_of_warps(const char *queues, int index) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        sum += reinterpret_cast<const float *>(queues + warp * Queue<WARPS>::WARP_BYTES)[index];
    }
    return sum;
}

template <typename T, typename Out, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ void gemm_small(Out *out, const T *x, const T *weight, const T *bias,
                                           const T *residual, int num_tokens, int num_rows,
                                           int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    const int first_row = blockIdx.x * TILE_ROWS;
    const int own_row = first_row + threadIdx.x % WARP_SIZE / 4;
    const T *low = own_row < num_rows ? weight + (int64_t)own_row * num_columns : nullptr;
    const T *high = own_row + 8 < num_rows ? low + 8 * (int64_t)num_columns : nullptr;
    const char *sums =
        block_product<T, TOKEN_TILES, WARPS>(low, high, weight, x, num_tokens, num_columns);
    for (int i = threadIdx.x; i < TILE_ROWS * TOKENS; i += WARPS * WARP_SIZE) {
        const int row = i % TILE_ROWS;
        const int token = i / TILE_ROWS;
        if (token >= num_tokens || first_row + row >= num_rows) {
            continue;
        }
        float sum = sum_of_warps<WARPS>(sums, row * TOKENS + token);
        const int64_t target = (int64_t)token * num_rows + first_row + row;
        if (bias != nullptr) {
            sum += to_float(bias[first_row + row]);
        }
        if (residual != nullptr) {
            sum += to_float(residual[target]);
        }
        out[target] = from_float<Out>(sum);
    }
}

// A block's tile is 8 rows of gates over the same 8 rows of ups.
template <typename T, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ void gemm_small_silu(T *out, const T *x, const T *weight,
                                                int num_tokens, int num_rows, int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    constexpr int ROWS = TILE_ROWS / 2;
    const int first_row = blockIdx.x * ROWS;
    const int own_row = first_row + threadIdx.x % WARP_SIZE / 4;
    const T *gate = own_row < num_rows ? weight + (int64_t)own_row * num_columns : nullptr;
    const T *up = own_row < num_rows ? gate + (int64_t)num_rows * num_columns : nullptr;
    const char *sums =
        block_product<T, TOKEN_TILES, WARPS>(gate, up, weight, x, num_tokens, num_columns);
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += WARPS * WARP_SIZE) {
        const int row = i % ROWS;
        const int token = i / ROWS;
        if (token >= num_tokens || first_row + row >= num_rows) {
            continue;
        }
        const float gated = sum_of_warps<WARPS>(sums, row * TOKENS + token);
        const float sum = sum_of_warps<WARPS>(sums, (row + ROWS) * TOKENS + token);
        out[(int64_t)token * num_rows + first_row + row] =
            from_float<T>(sum * gated / (1.0f + __expf(-gated)));
    }
}

#define ENTRY(T, SUFFIX, TOKENS, WARPS)                                                            \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 12 / WARPS)                           \
        gemm_small_##SUFFIX##_t##TOKENS##_w##WARPS(T *out, const T *x, const T *weight,            \
                                                   const T *bias, const T *residual,               \
                                                   int num_tokens, int n, int k) {                 \
        gemm_small<T, T, TOKENS / 8, WARPS>(out, x, weight, bias, residual, num_tokens, n, k);     \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 12 / WARPS)                           \
        gemm_small_##SUFFIX##_f32out_t##TOKENS##_w##WARPS(                                         \
            float *out, const T *x, const T *weight, const T *bias, int num_tokens, int n,         \
            int k) {                                                                               \
        gemm_small<T, float, TOKENS / 8, WARPS>(out, x, weight, bias, nullptr, num_tokens, n, k);  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 12 / WARPS)                           \
        gemm_small_silu_##SUFFIX##_t##TOKENS##_w##WARPS(T *out, const T *x, const T *weight,       \
                                                        int num_tokens, int n, int k) {            \
        gemm_small_silu<T, TOKENS / 8, WARPS>(out, x, weight, num_tokens, n, k);                   \
    }

ENTRY(__half, f16, 8, 4)
ENTRY(__half, f16, 8, 8)
ENTRY(__half, f16, 16, 4)
ENTRY(__half, f16, 16, 8)
ENTRY(__nv_bfloat16, bf16, 8, 4)
ENTRY(__nv_bfloat16, bf16, 8, 8)
ENTRY(__nv_bfloat16, bf16, 16, 4)
ENTRY(__nv_bfloat16, bf16, 16, 8)
