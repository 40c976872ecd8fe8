// gemm_small_push: y = x Wᵀ for up to 16 rows of x, this rank's part of a sum over ranks, which it
// sends to the other ranks as it goes. all_reduce_pushed_add_rms_norm (all_reduce.cu) must be the
// rank's next collective and takes it from there: what the link takes is hidden behind the end of
// the product.
//
// Shapes:  x [num_tokens, K], W [N, K] as checkpoints store it, out [num_tokens, N], which is the
//          `x` of the reduction; type T, row-major.
// Launch:  grid (⌈N / 16⌉), block 256, dynamic shared memory 98,304 bytes (needs the opt-in): the
//          form `deep` of gemm_small.
// Limits:  num_tokens from 1 to 8 or 16; K and N multiples of 8; pointers on 16 bytes.
// Method:  own, see gemm_small.cuh and peers.cuh. A thread stores the sums of two rows as one word.
#include "gemm_small.cuh"
#include "peers.cuh"

template <typename T, typename Form, int TOKEN_TILES>
__device__ __forceinline__ void gemm_small_push(T *out, const T *x, const T *weight,
                                                int num_tokens, int num_rows, int num_columns,
                                                const Peers &peers) {
    constexpr int TOKENS = 8 * TOKEN_TILES;
    constexpr int ROWS = Form::TILES * TILE_ROWS;
    const int first_row = blockIdx.x * ROWS;
    const Rows<T, Form::TILES> rows =
        rows_from<T, Form::TILES>(weight, first_row, num_rows, num_columns);
    uint32_t epoch;
    const char *sums = block_product<T, Form, TOKEN_TILES>(
        rows, weight, x, num_tokens, num_columns, [&] { epoch = read_next_epoch(peers); });
    const int64_t part = 2 * (int64_t)num_tokens * num_rows;
    const int64_t sent = slot_of(peers, epoch) + peers.rank * part;
    for (int i = threadIdx.x; i < ROWS / 2 * TOKENS; i += blockDim.x) {
        const int row = 2 * (i % (ROWS / 2));
        const int token = i / (ROWS / 2);
        if (token >= num_tokens || first_row + row >= num_rows) {
            continue;
        }
        const uint32_t pair = presentable(
            pack<T>(sum_of_warps<Form>(sums, row * TOKENS + token),
                    sum_of_warps<Form>(sums, (row + 1) * TOKENS + token)));
        const int64_t target = (int64_t)token * num_rows + first_row + row;
        for (int step = 1; step < peers.world_size; step++) {
            const int rank = peers.rank + step;
            char *workspace =
                peers.workspaces[rank < peers.world_size ? rank : rank - peers.world_size];
            store_system(workspace + sent + 2 * target, pair);
        }
        *reinterpret_cast<uint32_t *>(out + target) = pair;
    }
}

#define ENTRY(T, SUFFIX, TOKENS)                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * Deep::WARPS, 2)                              \
        gemm_small_push_##SUFFIX##_t##TOKENS(T *out, const T *x, const T *weight, int num_tokens,  \
                                             int n, int k, const __grid_constant__ Peers peers) {  \
        gemm_small_push<T, Deep, TOKENS / 8>(out, x, weight, num_tokens, n, k, peers);             \
    }

ENTRY(__half, f16, 8)
ENTRY(__half, f16, 16)
ENTRY(__nv_bfloat16, bf16, 8)
ENTRY(__nv_bfloat16, bf16, 16)
