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
// Method:  own, see gemm_small.cuh.
#include "gemm_small.cuh"

template <typename T, typename Out, typename Form, int TOKEN_TILES>
__device__ __forceinline__ void gemm_small(Out *out, const T *x, const T *weight, const T *bias,
                                           const T *residual, int num_tokens, int num_rows,
                                           int num_columns) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    constexpr int TILES = Form::TILES;
    constexpr int ROWS = TILES * TILE_ROWS;
    const int first_row = blockIdx.x * ROWS;
    const Rows<T, TILES> rows = rows_from<T, TILES>(weight, first_row, num_rows, num_columns);
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
