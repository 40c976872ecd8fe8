// gemm_small: y = x Wᵀ (+ bias) (+ residual) for up to 16 rows of x, as fast as memory gives W.
//
// Shapes:  x [num_tokens, K], W [N, K] as checkpoints store it, bias [N] or null, residual and
//          out [num_tokens, N]; type T, row-major; the _f32out forms write f32 (logits) and take
//          no residual. `residual` may be `out`.
//          gemm_small_silu: W [2 N, K], gates before ups; out [num_tokens, N] =
//          silu(x Gᵀ) · (x Uᵀ); without bias and residual.
// Names:   gemm_small{,_silu}_{f16,bf16}{,_f32out}_t{8,16}_w{4,8}: at most 8 or 16 tokens, 4 or 8
//          warps. More warps split K finer: better where N / 16 blocks do not fill the GPU.
// Launch:  grid (⌈N / 16⌉), block (32 · warps).
// Limits:  num_tokens from 1 to 8 or 16; K a multiple of 8; pointers on 16 bytes.
// Method:  own. W is the left operand of m16n8k16 products, tokens are the columns of the right
//          one. The order in which k is summed is free, so a thread takes 8 consecutive elements
//          of a row of W (one 16-byte load) as its share of two products: W goes from memory to
//          registers without shared memory, 8 loads in flight a thread, the next step's issued
//          before this step's products. Warps of a block take every w-th step of 128 elements of
//          K and add up through shared memory. W is loaded before wait_for_producer().
#include "common.cuh"

constexpr int TILE_ROWS = 16;
constexpr int STEP = 128;          // Elements of K that a warp takes at a time.
constexpr int CHUNK = 32;          // Elements of K in two products.
constexpr int CHUNKS = STEP / CHUNK;

// One step's share of W: rows group and group + 8 of each tile.
template <int TILES> struct Weights {
    uint4 low[TILES][CHUNKS];
    uint4 high[TILES][CHUNKS];
};

// `rows` are the thread's two rows of each tile, null where N has no such row.
template <typename T, int TILES>
__device__ __forceinline__ void load_weights(Weights<TILES> &w, const T *const (&rows)[TILES][2],
                                             int first, int num_columns) {
    const uint4 zeros = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = first + chunk * CHUNK;
        const bool is_inside = column < num_columns;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            w.low[tile][chunk] =
                is_inside && rows[tile][0] ? load16_once(rows[tile][0] + column) : zeros;
            w.high[tile][chunk] =
                is_inside && rows[tile][1] ? load16_once(rows[tile][1] + column) : zeros;
        }
    }
}

template <typename T, int TOKEN_TILES>
__device__ __forceinline__ void load_tokens(uint4 (&x)[TOKEN_TILES][CHUNKS],
                                            const T *const (&rows)[TOKEN_TILES], int first,
                                            int num_columns) {
    const uint4 zeros = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = first + chunk * CHUNK;
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            x[tile][chunk] =
                rows[tile] && column < num_columns ? load16(rows[tile] + column) : zeros;
        }
    }
}

// Computes the sums of the block's rows over all of K: acc[tile][token tile] of each warp, added
// up in `partial[(tile · 16 + row) · tokens + token]`. Ends with a barrier.
template <typename T, int TILES, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ void
block_product(float *partial, const T *const (&weight_rows)[TILES][2], const T *x, int num_tokens,
              int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int group = lane / 4;
    const int pair = lane % 4;

    int column = warp * STEP + 8 * pair;
    Weights<TILES> next;
    load_weights<T, TILES>(next, weight_rows, column, num_columns);
    wait_for_producer();
    release_consumer();
    const T *token_rows[TOKEN_TILES];
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; tile++) {
        const int token = 8 * tile + group;
        token_rows[tile] = token < num_tokens ? x + (int64_t)token * num_columns : nullptr;
    }
    float acc[TILES][TOKEN_TILES][4] = {};
    while (column - 8 * pair < num_columns) {
        const Weights<TILES> w = next;
        uint4 tokens[TOKEN_TILES][CHUNKS];
        load_tokens<T, TOKEN_TILES>(tokens, token_rows, column, num_columns);
        column += WARPS * STEP;
        load_weights<T, TILES>(next, weight_rows, column, num_columns);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint4 low = w.low[tile][chunk];
                const uint4 high = w.high[tile][chunk];
#pragma unroll
                for (int token = 0; token < TOKEN_TILES; token++) {
                    const uint4 b = tokens[token][chunk];
                    mma<T>(acc[tile][token], low.x, high.x, low.y, high.y, b.x, b.y);
                    mma<T>(acc[tile][token], low.z, high.z, low.w, high.w, b.z, b.w);
                }
            }
        }
    }
    constexpr int SIZE = TILES * TILE_ROWS * TOKENS;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int token = 0; token < TOKEN_TILES; token++) {
            float *target = partial + warp * SIZE + 8 * token + 2 * pair;
            float *low = target + (tile * TILE_ROWS + group) * TOKENS;
            float *high = low + 8 * TOKENS;
            *reinterpret_cast<float2 *>(low) =
                make_float2(acc[tile][token][0], acc[tile][token][1]);
            *reinterpret_cast<float2 *>(high) =
                make_float2(acc[tile][token][2], acc[tile][token][3]);
        }
    }
    __syncthreads();
}

// Returns the sum of all warps' partial sums of one output.
template <int SIZE, int WARPS>
__device__ __forceinline__ float sum_of_warps(const float *partial, int index) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        sum += partial[warp * SIZE + index];
    }
    return sum;
}

template <typename T, typename Out, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ void gemm_small(Out *out, const T *x, const T *weight, const T *bias,
                                           const T *residual, int num_tokens, int num_rows,
                                           int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    constexpr int SIZE = TILE_ROWS * TOKENS;
    __shared__ float partial[WARPS * SIZE];
    const int lane = threadIdx.x % WARP_SIZE;
    const int first_row = blockIdx.x * TILE_ROWS;
    const T *rows[1][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + lane / 4 + 8 * half;
        rows[0][half] = row < num_rows ? weight + (int64_t)row * num_columns : nullptr;
    }
    block_product<T, 1, TOKEN_TILES, WARPS>(partial, rows, x, num_tokens, num_columns);
    for (int i = threadIdx.x; i < SIZE; i += WARPS * WARP_SIZE) {
        const int row = i % TILE_ROWS;
        const int token = i / TILE_ROWS;
        if (token >= num_tokens || first_row + row >= num_rows) {
            continue;
        }
        float sum = sum_of_warps<SIZE, WARPS>(partial, row * TOKENS + token);
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

template <typename T, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ void gemm_small_silu(T *out, const T *x, const T *weight,
                                                int num_tokens, int num_rows, int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    constexpr int SIZE = 2 * TILE_ROWS * TOKENS;
    __shared__ float partial[WARPS * SIZE];
    const int lane = threadIdx.x % WARP_SIZE;
    const int first_row = blockIdx.x * TILE_ROWS;
    const T *rows[2][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + lane / 4 + 8 * half;
        const T *gate = weight + (int64_t)row * num_columns;
        rows[0][half] = row < num_rows ? gate : nullptr;
        rows[1][half] = row < num_rows ? gate + (int64_t)num_rows * num_columns : nullptr;
    }
    block_product<T, 2, TOKEN_TILES, WARPS>(partial, rows, x, num_tokens, num_columns);
    for (int i = threadIdx.x; i < TILE_ROWS * TOKENS; i += WARPS * WARP_SIZE) {
        const int row = i % TILE_ROWS;
        const int token = i / TILE_ROWS;
        if (token >= num_tokens || first_row + row >= num_rows) {
            continue;
        }
        const int index = row * TOKENS + token;
        const float gate = sum_of_warps<SIZE, WARPS>(partial, index);
        const float up = sum_of_warps<SIZE, WARPS>(partial, index + TILE_ROWS * TOKENS);
        out[(int64_t)token * num_rows + first_row + row] =
            from_float<T>(up * gate / (1.0f + __expf(-gate)));
    }
}

// The second launch bound asks for as many warps a multiprocessor as hide the memory's latency.
#define ENTRY(T, SUFFIX, TOKENS, WARPS)                                                            \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)                           \
        gemm_small_##SUFFIX##_t##TOKENS##_w##WARPS(T *out, const T *x, const T *weight,            \
                                                   const T *bias, const T *residual,               \
                                                   int num_tokens, int n, int k) {                 \
        gemm_small<T, T, TOKENS / 8, WARPS>(out, x, weight, bias, residual, num_tokens, n, k);     \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)                           \
        gemm_small_##SUFFIX##_f32out_t##TOKENS##_w##WARPS(                                         \
            float *out, const T *x, const T *weight, const T *bias, int num_tokens, int n,         \
            int k) {                                                                               \
        gemm_small<T, float, TOKENS / 8, WARPS>(out, x, weight, bias, nullptr, num_tokens, n, k);  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8 / WARPS)                            \
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
