// gemm_small: y = x Wᵀ (+ bias) (+ residual) for up to 16 rows of x, as fast as memory gives W.
//
// Shapes:  x [num_tokens, K], W [N, K] as checkpoints store it, bias [N] or null, residual and
//          out [num_tokens, N]; type T, row-major; the _f32out forms write f32 (logits) and take
//          no residual. `residual` may be `out`.
//          gemm_small_silu: W [2 N, K], gates before ups; out [num_tokens, N] =
//          silu(x Gᵀ) · (x Uᵀ); without bias and residual.
// Names:   gemm_small{,_silu}_{f16,bf16}{,_f32out}_t{8,16}_{wide,deep,r32}: at most 8 or 16 tokens.
//          wide: for N from about 4,096 on. deep: a deeper queue and two blocks a multiprocessor
//          at most, which spreads a small N (N / 16 blocks) evenly. r32: blocks of 32 rows, so
//          that x is read half as often: for 9 to 16 tokens and a large N.
// Launch:  grid (⌈N / 16⌉), r32 (⌈N / 32⌉), for silu twice that; block 256, r32 128; dynamic
//          shared memory 65,536 bytes, deep 98,304 (needs the opt-in).
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

// A form: tiles of 16 rows of a block, its warps, and how many steps a warp's queue holds.
template <int TILES_, int WARPS_, int STAGES_> struct Form {
    static constexpr int TILES = TILES_;
    static constexpr int WARPS = WARPS_;
    static constexpr int STAGES = STAGES_;
    static constexpr int STAGE_BYTES = TILES * TILE_ROWS * STEP * 2;
    static constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
};

// A thread's two rows of each tile, null where W has none.
template <typename T, int TILES> struct Rows {
    const T *low[TILES];
    const T *high[TILES];
};

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

// Sums the block's rows of W over all of K, and returns where the sums of warp 0 lie:
// [row][token], each further warp's Form::WARP_BYTES later. Ends with a barrier.
template <typename T, typename Form, int TOKEN_TILES>
__device__ __forceinline__ const char *block_product(const Rows<T, Form::TILES> &rows,
                                                     const T *weight, const T *x, int num_tokens,
                                                     int num_columns) {
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

template <typename T, typename Out, typename Form, int TOKEN_TILES>
__device__ __forceinline__ void gemm_small(Out *out, const T *x, const T *weight, const T *bias,
                                           const T *residual, int num_tokens, int num_rows,
                                           int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    constexpr int TILES = Form::TILES;
    constexpr int ROWS = TILES * TILE_ROWS;
    const int first_row = blockIdx.x * ROWS;
    Rows<T, TILES> rows;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int row = first_row + tile * TILE_ROWS + threadIdx.x % WARP_SIZE / 4;
        const T *low = weight + (int64_t)row * num_columns;
        rows.low[tile] = row < num_rows ? low : nullptr;
        rows.high[tile] = row + 8 < num_rows ? low + 8 * (int64_t)num_columns : nullptr;
    }
    const char *sums =
        block_product<T, Form, TOKEN_TILES>(rows, weight, x, num_tokens, num_columns);
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += blockDim.x) {
        const int row = i % ROWS;
        const int token = i / ROWS;
        if (token >= num_tokens || first_row + row >= num_rows) {
            continue;
        }
        float sum = sum_of_warps<Form>(sums, row * TOKENS + token);
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

// Of each tile, the first 8 rows are gates and the last 8 the ups of the same outputs.
template <typename T, typename Form, int TOKEN_TILES>
__device__ __forceinline__ void gemm_small_silu(T *out, const T *x, const T *weight,
                                                int num_tokens, int num_rows, int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    constexpr int TILES = Form::TILES;
    constexpr int ROWS = TILES * TILE_ROWS / 2;
    const int first_row = blockIdx.x * ROWS;
    Rows<T, TILES> rows;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int row = first_row + tile * TILE_ROWS / 2 + threadIdx.x % WARP_SIZE / 4;
        const T *gate = weight + (int64_t)row * num_columns;
        rows.low[tile] = row < num_rows ? gate : nullptr;
        rows.high[tile] = row < num_rows ? gate + (int64_t)num_rows * num_columns : nullptr;
    }
    const char *sums =
        block_product<T, Form, TOKEN_TILES>(rows, weight, x, num_tokens, num_columns);
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += blockDim.x) {
        const int row = i % ROWS;
        const int token = i / ROWS;
        if (token >= num_tokens || first_row + row >= num_rows) {
            continue;
        }
        const int index = (row / 8 * TILE_ROWS + row % 8) * TOKENS + token;
        const float gate = sum_of_warps<Form>(sums, index);
        const float up = sum_of_warps<Form>(sums, index + 8 * TOKENS);
        out[(int64_t)token * num_rows + first_row + row] =
            from_float<T>(up * gate / (1.0f + __expf(-gate)));
    }
}

using Wide = Form<1, 8, 2>;
using Deep = Form<1, 8, 3>;
using R32 = Form<2, 4, 2>;

// BLOCKS is how many of them a multiprocessor holds at once.
#define ENTRY(T, SUFFIX, TOKENS, NAME, FORM, BLOCKS)                                               \
    extern "C" __global__ void __launch_bounds__(32 * FORM::WARPS, BLOCKS)                         \
        gemm_small_##SUFFIX##_t##TOKENS##_##NAME(T *out, const T *x, const T *weight,              \
                                                 const T *bias, const T *residual,                 \
                                                 int num_tokens, int n, int k) {                   \
        gemm_small<T, T, FORM, TOKENS / 8>(out, x, weight, bias, residual, num_tokens, n, k);      \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * FORM::WARPS, BLOCKS)                         \
        gemm_small_##SUFFIX##_f32out_t##TOKENS##_##NAME(float *out, const T *x, const T *weight,   \
                                                        const T *bias, int num_tokens, int n,      \
                                                        int k) {                                   \
        gemm_small<T, float, FORM, TOKENS / 8>(out, x, weight, bias, nullptr, num_tokens, n, k);   \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * FORM::WARPS, BLOCKS)                         \
        gemm_small_silu_##SUFFIX##_t##TOKENS##_##NAME(T *out, const T *x, const T *weight,         \
                                                      int num_tokens, int n, int k) {              \
        gemm_small_silu<T, FORM, TOKENS / 8>(out, x, weight, num_tokens, n, k);                    \
    }
#define ENTRIES(T, SUFFIX)                                                                         \
    ENTRY(T, SUFFIX, 8, wide, Wide, 3)                                                             \
    ENTRY(T, SUFFIX, 8, deep, Deep, 2)                                                             \
    ENTRY(T, SUFFIX, 8, r32, R32, 3)                                                               \
    ENTRY(T, SUFFIX, 16, wide, Wide, 2)                                                            \
    ENTRY(T, SUFFIX, 16, deep, Deep, 2)                                                            \
    ENTRY(T, SUFFIX, 16, r32, R32, 3)

ENTRIES(__half, f16)
ENTRIES(__nv_bfloat16, bf16)
