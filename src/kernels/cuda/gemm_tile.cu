// gemm_tile: y = x Wᵀ (+ bias) (+ residual) for many rows of x, as fast as Hopper's tensor cores go.
//
// Shapes:  x [num_tokens, K], W [N, K] as checkpoints store it, bias [N] or null, residual and out
//          [num_tokens, N], residual or null; type T, row-major. The product is rounded to T, and
//          again once the residual is added: the bits of add_rms_norm's sum (norm.cu), without its
//          reads and writes of the product.
//          gemm_tile_silu: W [2 N, K], gates before ups; out [num_tokens, N] =
//          silu(x Gᵀ) · (x Uᵀ), of both products rounded to T (f16 at most 65,504); without bias
//          and residual.
// Names:   gemm_tile_{f16,bf16}_n{128,192,224,256}, gemm_tile_silu_{f16,bf16}_n{128,192,256}:
//          columns of a tile of 128 tokens; for silu half of them are gates, half their ups.
// FP8:     gemm_tile{,_silu}_fp8_{f16,bf16}_n{…}: x and W E4M3, seen as pairs, so that K here is half
//          of theirs; scales f32, x's [num_tokens] and W's [its rows]; a sum is multiplied by both
//          before bias or SiLU. Sums keep about 14 bits on the way, as all of Hopper's FP8 products.
// Maps:    of x, boxes of 64 × 128 elements; of W (2 N rows for silu), boxes of 64 × n / 2.
// Launch:  any even grid, best one block a multiprocessor; clusters of 2; block 384; dynamic shared
//          memory 1,024 + stages · (16,384 + 128 n) bytes, stages = min(6, 220,000 / stage).
// Limits:  sm_90a. N and K multiples of 8; pointers on 16 bytes.
// Method:  own, after the designs of CUTLASS's warp-specialised kernels: one warp brings tiles of
//          K = 64 through a ring of stages, two warpgroups multiply 64 tokens each. The two blocks
//          of a cluster take tokens one after the other and the same columns: each brings half of
//          W's tile for both. Blocks take one tile after another; while x waits for its producer
//          the first stages of W are brought. Groups of 16 tiles of tokens share W in the L2 cache.
//          A tile's sums are rounded into registers, which frees the sums, and stored between the
//          next tile's products: up to 17 % less time for one product, no less for those of whole
//          prompts, which the GPU's power limits (docs/gpu_log.md, runs 25 and 26). Lost: clusters
//          of 4 (runs 25 and 27), prefetching into L2 (run 25).
#include "hopper.cuh"

#ifdef HAS_HOPPER

constexpr int TILE_TOKENS = 128;
constexpr int STEP = PANEL_COLUMNS;  // Elements of K of a stage.
constexpr int GROUP = 8;             // Pairs of tiles of tokens that are taken together.
constexpr int WARPGROUPS = 3;        // Two multiply, the last one brings.

template <int COLUMNS> struct Ring {
    static constexpr int X_BYTES = TILE_TOKENS * PANEL_ROW_BYTES;
    static constexpr int W_BYTES = COLUMNS * PANEL_ROW_BYTES;
    static constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
    static constexpr int STAGES = 220000 / STAGE_BYTES < 6 ? 220000 / STAGE_BYTES : 6;
};

// Tile `index` of the cluster: a pair of tiles of tokens, and which columns.
struct Place {
    int pair;
    int column;
};
__device__ __forceinline__ Place place_of(int index, int num_pairs, int num_columns) {
    const int group = index / (GROUP * num_columns);
    const int first = group * GROUP;
    const int size = min(GROUP, num_pairs - first);
    const int rest = index - group * GROUP * num_columns;
    return {first + rest % size, rest / size};
}

// A ring's stage and how often it went round, odd or even.
template <int STAGES> struct Turn {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Adds eight elements of each, rounded.
template <typename T> __device__ __forceinline__ uint4 add8(uint4 a, uint4 b) {
    float sums[8], others[8];
    unpack8<T>(a, sums);
    unpack8<T>(b, others);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        sums[j] += others[j];
    }
    return pack8<T>(sums);
}

// Makes infinities of a pair the largest numbers, where T has so few.
template <typename T> __device__ __forceinline__ uint32_t saturate(uint32_t pair) { return pair; }
template <> __device__ __forceinline__ uint32_t saturate<__half>(uint32_t pair) {
    const __half2 least = __half2half2(__ushort_as_half(0xfbff));
    const __half2 most = __half2half2(__ushort_as_half(0x7bff));
    const __half2 value = reinterpret_cast<const __half2 &>(pair);
    const __half2 bounded = __hmax2_nan(__hmin2_nan(value, most), least);
    return reinterpret_cast<const uint32_t &>(bounded);
}

// silu(gate) · up of pairs.
template <typename T> __device__ __forceinline__ uint32_t silu_pair(uint32_t gates, uint32_t ups) {
    const float2 gate = unpack<T>(saturate<T>(gates)), up = unpack<T>(saturate<T>(ups));
    return pack<T>(__fdividef(up.x * gate.x, 1.0f + __expf(-gate.x)),
                   __fdividef(up.y * gate.y, 1.0f + __expf(-gate.y)));
}

template <typename In, typename T, int COLUMNS, bool IS_SILU>
__device__ __forceinline__ void gemm_tile(const TensorMap &x_map, const TensorMap &w_map, T *out,
                                          const T *bias, const T *residual, Scales scales,
                                          int num_tokens, int n, int k) {
    using Ring = Ring<COLUMNS>;
    constexpr int STAGES = Ring::STAGES;
    constexpr int OUT_COLUMNS = IS_SILU ? COLUMNS / 2 : COLUMNS;
    static_assert(OUT_COLUMNS % 32 == 0, "four lanes store an octet of columns each");
    // A tile's stores come in parts, one after each of the next tile's first steps.
    constexpr int PARTS = COLUMNS / 32;
    extern __shared__ char shared[];
    __shared__ uint64_t barriers[2 * STAGES];
    const uint32_t ring = panel_address(shared_address(shared));
    const uint32_t full = shared_address(barriers);
    const uint32_t empty = full + 8 * STAGES;
    const uint32_t rank = cluster_rank();
    const int warpgroup = threadIdx.x / WARPGROUP_SIZE;

    if (threadIdx.x == 0) {
        prefetch_map(x_map);
        prefetch_map(w_map);
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(full + 8 * stage, 1);
            init_barrier(empty + 8 * stage, 4);  // Two warpgroups of each block.
        }
        fence_barrier_init();
    }
    __syncthreads();
    sync_cluster();

    const int num_pairs = (num_tokens + 2 * TILE_TOKENS - 1) / (2 * TILE_TOKENS);
    const int num_columns = (n + OUT_COLUMNS - 1) / OUT_COLUMNS;
    const int num_tiles = num_pairs * num_columns;
    const int num_steps = (k + STEP - 1) / STEP;
    const int first_tile = blockIdx.x / 2;
    const int num_clusters = gridDim.x / 2;
    Turn<STAGES> turn;

    if (warpgroup == WARPGROUPS - 1) {
        give_registers<40>();
        if (threadIdx.x == WARPGROUP_SIZE * (WARPGROUPS - 1)) {
            const auto bring_w = [&](const Place &place, int step) {
                const int row = IS_SILU ? rank * n + place.column * OUT_COLUMNS
                                        : place.column * COLUMNS + rank * (COLUMNS / 2);
                const uint32_t target = ring + turn.stage * Ring::STAGE_BYTES + Ring::X_BYTES +
                                        rank * (Ring::W_BYTES / 2);
                arrive_expecting(full + 8 * turn.stage, Ring::STAGE_BYTES);
                copy_box_to_all(target, w_map, full + 8 * turn.stage, step * STEP, row, 3);
            };
            const auto bring_x = [&](const Place &place, int step) {
                const int row = (2 * place.pair + rank) * TILE_TOKENS;
                copy_box(ring + turn.stage * Ring::STAGE_BYTES, x_map, full + 8 * turn.stage,
                         step * STEP, row, EVICT_NORMAL);
            };
            // The first stages of W before x is there.
            const int ahead = first_tile < num_tiles ? min(STAGES, num_steps) : 0;
            const Place first = place_of(first_tile, num_pairs, num_columns);
            for (int step = 0; step < ahead; step++, turn.next()) {
                bring_w(first, step);
            }
            wait_for_producer();
            release_consumer();
            turn = {};
            for (int step = 0; step < ahead; step++, turn.next()) {
                bring_x(first, step);
            }
            for (int tile = first_tile; tile < num_tiles; tile += num_clusters) {
                const Place place = place_of(tile, num_pairs, num_columns);
                for (int step = tile == first_tile ? ahead : 0; step < num_steps;
                     step++, turn.next()) {
                    wait_barrier(empty + 8 * turn.stage, turn.parity ^ 1);
                    bring_w(place, step);
                    bring_x(place, step);
                }
            }
        }
    } else {
        take_registers<232>();
        wait_for_producer();
        release_consumer();
        const int lane = threadIdx.x % WARP_SIZE;
        const int warp = threadIdx.x % WARPGROUP_SIZE / WARP_SIZE;
        const int quarter = lane % 4;
        // One thread tells each block of the cluster that a stage may be filled again.
        const int told_rank = lane == 0 && warp < 2 ? warp : -1;
        const auto release = [&](int stage) {
            if (told_rank >= 0) {
                arrive_at(empty + 8 * stage, told_rank);
            }
        };
        float sums[COLUMNS / 2];
        int last_stage = 0;
        const auto multiply_step = [&](int step) {
            wait_barrier(full + 8 * turn.stage, turn.parity);
            const uint32_t stage = ring + turn.stage * Ring::STAGE_BYTES;
            const uint64_t x = describe_panels(stage + warpgroup * 64 * PANEL_ROW_BYTES);
            const uint64_t w = describe_panels(stage + Ring::X_BYTES);
            begin_products();
#pragma unroll
            for (int part = 0; part < STEP / PRODUCT_COLUMNS; part++) {
                multiply_transposed<In, COLUMNS>(sums, advance(x, part * PRODUCT_BYTES),
                                                 advance(w, part * PRODUCT_BYTES),
                                                 step > 0 || part > 0);
            }
            commit_products();
            if (step > 0) {
                wait_for_products<1>();
                release(last_stage);
            }
            last_stage = turn.stage;
            turn.next();
        };

        // The tile before, rounded: of octet j of its columns the pair of row `half` at
        // [2 j + half], and where its first pair is in the output.
        uint32_t held[COLUMNS / 4];
        int held_row = 0, held_column = 0;
        // Stores of four octets of columns both rows, with SiLU (twice the work) one of them.
        const auto store_part = [&](int part) {
            const int octet = IS_SILU ? part / 2 * 4 : part * 4;
            const int column = held_column + 8 * (octet + quarter);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (IS_SILU && half != part % 2) {
                    continue;
                }
                const int row = held_row + 8 * half;
                const int64_t at = (int64_t)row * n + column;
                const bool is_inside = row < num_tokens && column < n;
                const bool has_residual = !IS_SILU && residual != nullptr;
                const uint4 added = has_residual && is_inside ? load16(residual + at) : uint4{};
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    words[i] = held[2 * (octet + i) + half];
                    if (IS_SILU) {
                        const uint32_t ups = held[2 * (octet + i + OUT_COLUMNS / 8) + half];
                        words[i] = silu_pair<T>(words[i], ups);
                    }
                }
                uint4 packed = gather_octet(words[0], words[1], words[2], words[3]);
                if (has_residual) {
                    packed = add8<T>(packed, added);
                }
                if (is_inside) {
                    store16(out + at, packed);
                }
            }
        };
        // Scales, adds the bias and rounds.
        const auto hold = [&](const Place &place) {
            held_row = (2 * place.pair + rank) * TILE_TOKENS + warpgroup * 64 + warp * 16 + lane / 4;
            held_column = place.column * OUT_COLUMNS;
            float x_scales[2];
            uint32_t biases[COLUMNS / 8];
            // All at once, while the last products run.
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = held_row + 8 * half;
                x_scales[half] = IS_FP8<In> && row < num_tokens ? __ldcg(scales.x + row) : 1.0f;
            }
#pragma unroll
            for (int octet = 0; octet < COLUMNS / 8; octet++) {
                const int column = held_column + 8 * octet + 2 * quarter;
                biases[octet] = !IS_SILU && bias != nullptr && column < n
                                    ? __ldg(reinterpret_cast<const uint32_t *>(bias + column))
                                    : 0;
            }
            wait_for_products<0>();
            pin(sums);
            release(last_stage);
#pragma unroll
            for (int octet = 0; octet < COLUMNS / 8; octet++) {
                const bool is_up = IS_SILU && octet >= OUT_COLUMNS / 8;
                const int column =
                    held_column + 8 * (octet % (OUT_COLUMNS / 8)) + 2 * quarter;
                float2 w_scales = {1.0f, 1.0f};
                if (IS_FP8<In> && column < n) {
                    const float *source = scales.w + (is_up ? n : 0) + column;
                    w_scales = __ldg(reinterpret_cast<const float2 *>(source));
                }
                const float2 added = unpack<T>(biases[octet]);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2 pair = {sums[4 * octet + 2 * half], sums[4 * octet + 2 * half + 1]};
                    if (IS_FP8<In>) {
                        pair.x *= x_scales[half] * w_scales.x;
                        pair.y *= x_scales[half] * w_scales.y;
                    }
                    if (!IS_SILU) {
                        pair.x += added.x;
                        pair.y += added.y;
                    }
                    held[2 * octet + half] = pack<T>(pair.x, pair.y);
                }
            }
        };

        for (int tile = first_tile; tile < num_tiles; tile += num_clusters) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                if (part < num_steps) {
                    multiply_step(part);
                }
                if (tile != first_tile) {
                    store_part(part);
                }
            }
            for (int step = PARTS; step < num_steps; step++) {
                multiply_step(step);
            }
            hold(place_of(tile, num_pairs, num_columns));
        }
        if (first_tile < num_tiles) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                store_part(part);
            }
        }
    }
    // No block may go while another one's copies or arrivals are still under way to it.
    sync_cluster();
}

#define ENTRY(T, SUFFIX, COLUMNS)                                                                  \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)                 \
        gemm_tile_##SUFFIX##_n##COLUMNS(const __grid_constant__ TensorMap x,                       \
                                        const __grid_constant__ TensorMap w, T *out,               \
                                        const T *bias, const T *residual, int num_tokens, int n,   \
                                        int k) {                                                   \
        gemm_tile<T, T, COLUMNS, false>(x, w, out, bias, residual, {}, num_tokens, n, k);          \
    }                                                                                              \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)                 \
        gemm_tile_fp8_##SUFFIX##_n##COLUMNS(                                                       \
            const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, T *out,      \
            const T *bias, const T *residual, const float *x_scales, const float *w_scales,        \
            int num_tokens, int n, int k) {                                                        \
        gemm_tile<E4m3Pair, T, COLUMNS, false>(x, w, out, bias, residual, {x_scales, w_scales},    \
                                               num_tokens, n, k);                                  \
    }
#define ENTRY_SILU(T, SUFFIX, COLUMNS)                                                             \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)                 \
        gemm_tile_silu_##SUFFIX##_n##COLUMNS(const __grid_constant__ TensorMap x,                  \
                                             const __grid_constant__ TensorMap w, T *out,          \
                                             int num_tokens, int n, int k) {                       \
        gemm_tile<T, T, COLUMNS, true>(x, w, out, nullptr, nullptr, {}, num_tokens, n, k);         \
    }                                                                                              \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)                 \
        gemm_tile_silu_fp8_##SUFFIX##_n##COLUMNS(                                                  \
            const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, T *out,      \
            const float *x_scales, const float *w_scales, int num_tokens, int n, int k) {          \
        gemm_tile<E4m3Pair, T, COLUMNS, true>(x, w, out, nullptr, nullptr, {x_scales, w_scales},   \
                                              num_tokens, n, k);                                   \
    }
#define ENTRIES(T, SUFFIX)                                                                         \
    ENTRY(T, SUFFIX, 128)                                                                          \
    ENTRY(T, SUFFIX, 192)                                                                          \
    ENTRY(T, SUFFIX, 224)                                                                          \
    ENTRY(T, SUFFIX, 256)                                                                          \
    ENTRY_SILU(T, SUFFIX, 128)                                                                     \
    ENTRY_SILU(T, SUFFIX, 192)                                                                     \
    ENTRY_SILU(T, SUFFIX, 256)

ENTRIES(__half, f16)
ENTRIES(__nv_bfloat16, bf16)

#else

WITHOUT_HOPPER(gemm_tile)

#endif
