// gemm_stream: y = x Wᵀ (+ bias) for up to 64 rows of x, as fast as memory gives W.
//
// Shapes:  x [num_tokens, K], W [N, K] as checkpoints store it, bias [N] or null, out
//          [num_tokens, N]; type T, row-major; the _f32out forms write f32 (logits).
//          gemm_stream_silu: W [2 N, K], gates before ups; out [num_tokens, N] =
//          silu(x Gᵀ) · (x Uᵀ); without bias.
//          partial f32 [grid][64 t], flags u32 [grid], zero at first and after every launch.
// Names:   gemm_stream{,_silu}_{f16,bf16}{,_f32out}_t{16,32,64}: at most t tokens.
// FP8:     gemm_stream{,_silu}_fp8_{f16,bf16}_t{…}: x and W E4M3, seen as pairs, so that K here is half
//          of theirs; scales f32, x's [num_tokens] and W's [its rows]; a sum is multiplied by both
//          before bias or SiLU. Sums keep about 14 bits on the way, as all of Hopper's FP8 products.
// Maps:    of x, boxes of 64 × t elements; of W, boxes of 64 × 64. For silu W is seen as
//          [N / 8][2][8][K], boxes of 64 × 8 × 2 × 4: octets of gates and ups alternate.
// Launch:  grid: a block a multiprocessor, at most ⌈N / 64⌉ · ⌈K / 64⌉ (for silu of 2 N);
//          block 160; dynamic shared memory 1,024 + 272 t + stages · 128 (64 + t) bytes, stages =
//          ⌊131,072 / (128 (64 + t))⌋.
// Limits:  sm_90a. N and K multiples of 8; pointers on 16 bytes; num_tokens from 1 to t.
// Method:  own; the division of work is "Stream-K" (Osama et al., 2023). W is the left operand of
//          warpgroup products, x the right one. Steps of 64 elements of K through all tiles of 64
//          rows are divided evenly: every multiprocessor reads equally much of W, without a pause
//          between tiles. One warp brings the steps through a ring; W comes before x's producer is
//          waited for. The ring is as large as leaves attention_decode room beside it, which starts
//          early too: rings of which two fit a multiprocessor are slower by 3 %. A tile that a
//          block began and did not end is ended by the blocks after it, which do that first: they
//          leave their sums in `partial`, and the block that began it adds them in order.
#include "hopper.cuh"

#ifdef HAS_HOPPER

constexpr int ROWS = 64;
constexpr int STEP = PANEL_COLUMNS;  // Elements of K of a stage.
constexpr int W_BYTES = ROWS * PANEL_ROW_BYTES;
constexpr int SUMS_STRIDE = ROWS + 4;  // Floats; two tokens' rows in other banks.

template <int TOKENS> struct Ring {
    static constexpr int STAGE_BYTES = W_BYTES + TOKENS * PANEL_ROW_BYTES;
    static constexpr int STAGES = 131072 / STAGE_BYTES;
};

template <typename T> __device__ __forceinline__ void store8(T *target, const float (&values)[8]) {
    store16(target, pack8<T>(values));
}
template <> __device__ __forceinline__ void store8(float *target, const float (&values)[8]) {
    float4 *vectors = reinterpret_cast<float4 *>(target);
    vectors[0] = make_float4(values[0], values[1], values[2], values[3]);
    vectors[1] = make_float4(values[4], values[5], values[6], values[7]);
}
__device__ __forceinline__ void load8(float (&values)[8], const float *source) {
    const float4 *vectors = reinterpret_cast<const float4 *>(source);
    const float4 low = vectors[0], high = vectors[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}
__device__ __forceinline__ void scale8(float (&values)[8], float x_scale, const float *w_scales) {
    float factors[8];
    load8(factors, w_scales);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        values[j] *= x_scale * factors[j];
    }
}

// A barrier of the warpgroup that multiplies.
__device__ __forceinline__ void sync_warpgroup() {
    sync_threads(1, WARPGROUP_SIZE);
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t *flag) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(uint32_t *flag, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// The first of all steps that block `block` takes; the next block's first one ends them.
__device__ __forceinline__ int first_step_of(int block, int num_steps) {
    return (int)((int64_t)num_steps * block / gridDim.x);
}

// Leaves the sums for the block that began the tile.
template <int COUNT>
__device__ __forceinline__ void leave_sums(const float (&sums)[COUNT], float *partial,
                                           uint32_t *flags) {
    float *target = partial + (int64_t)blockIdx.x * COUNT * WARPGROUP_SIZE + threadIdx.x;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        __stcg(target + i * WARPGROUP_SIZE, sums[i]);
    }
    __threadfence();
    sync_warpgroup();
    if (threadIdx.x == 0) {
        store_release(flags + blockIdx.x, 1);
    }
}

// Adds what the blocks after this one computed of its last tile, which ends at `end`.
template <int COUNT>
__device__ __forceinline__ void add_sums(float (&sums)[COUNT], const float *partial,
                                         uint32_t *flags, int end, int num_steps) {
    int block = blockIdx.x + 1;
    for (; first_step_of(block, num_steps) < end; block++) {
        const uint32_t start = coarse_time();
        while (load_acquire(flags + block) == 0) {
            check_wait(start);
        }
        const float *source = partial + (int64_t)block * COUNT * WARPGROUP_SIZE + threadIdx.x;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            sums[i] += __ldcg(source + i * WARPGROUP_SIZE);
        }
    }
    sync_warpgroup();
    const int other = blockIdx.x + 1 + threadIdx.x;
    if (other < block) {
        flags[other] = 0;
    }
}

// Writes a tile's outputs, rows in octets.
template <typename In, typename T, typename Out, int TOKENS, bool IS_SILU>
__device__ __forceinline__ void write_tile(const float (&sums)[TOKENS / 2], float *staging,
                                           Out *out, const T *bias, Scales scales, int tile,
                                           int num_tokens, int n) {
    constexpr int OUT_ROWS = IS_SILU ? ROWS / 2 : ROWS;
    constexpr int OCTETS = OUT_ROWS / 8;
    const int lane = threadIdx.x % WARP_SIZE;
    const int own_row = threadIdx.x / WARP_SIZE * 16 + lane / 4;
    // The tile before has been read from there.
    sync_warpgroup();
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        const int token = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        staging[token * SUMS_STRIDE + own_row + 8 * (i / 2 % 2)] = sums[i];
    }
    sync_warpgroup();
    for (int i = threadIdx.x; i < num_tokens * OCTETS; i += WARPGROUP_SIZE) {
        const int token = i / OCTETS;
        const int octet = i % OCTETS;
        const int row = tile * OUT_ROWS + 8 * octet;
        if (row >= n) {
            continue;
        }
        const float *source = staging + token * SUMS_STRIDE + (IS_SILU ? 16 : 8) * octet;
        float values[8];
        load8(values, source);
        if (IS_FP8<In>) {
            scale8(values, __ldcg(scales.x + token), scales.w + row);
        }
        if (IS_SILU) {
            float ups[8];
            load8(ups, source + 8);
            if (IS_FP8<In>) {
                scale8(ups, __ldcg(scales.x + token), scales.w + n + row);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                values[j] = __fdividef(ups[j] * values[j], 1.0f + __expf(-values[j]));
            }
        } else if (bias != nullptr) {
            float added[8];
            unpack8<T>(load16(bias + row), added);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                values[j] += added[j];
            }
        }
        store8(out + (int64_t)token * n + row, values);
    }
}

template <typename In, typename T, typename Out, int TOKENS, bool IS_SILU>
__device__ __forceinline__ void gemm_stream(const TensorMap &x_map, const TensorMap &w_map,
                                            Out *out, const T *bias, Scales scales,
                                            float *partial, uint32_t *flags, int num_tokens, int n,
                                            int k) {
    using Ring = Ring<TOKENS>;
    constexpr int STAGES = Ring::STAGES;
    extern __shared__ char shared[];
    __shared__ uint64_t barriers[2 * STAGES];
    const uint32_t ring = panel_address(shared_address(shared));
    const uint32_t full = shared_address(barriers);
    const uint32_t empty = full + 8 * STAGES;

    if (threadIdx.x == 0) {
        prefetch_map(x_map);
        prefetch_map(w_map);
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(full + 8 * stage, 1);
            init_barrier(empty + 8 * stage, 1);
        }
        fence_barrier_init();
    }
    __syncthreads();

    const int num_rows = IS_SILU ? 2 * n : n;
    const int tile_steps = (k + STEP - 1) / STEP;
    const int num_steps = (num_rows + ROWS - 1) / ROWS * tile_steps;
    const int first_step = first_step_of(blockIdx.x, num_steps);
    const int last_step = first_step_of(blockIdx.x + 1, num_steps);
    int stage = 0;
    uint32_t parity = 0;

    if (threadIdx.x == WARPGROUP_SIZE) {
        const auto bring_w = [&](int step) {
            const uint32_t target = ring + stage * Ring::STAGE_BYTES;
            const uint32_t barrier = full + 8 * stage;
            const int tile = step / tile_steps;
            const int column = step % tile_steps * STEP;
            arrive_expecting(barrier, Ring::STAGE_BYTES);
            if (IS_SILU) {
                copy_box4(target, w_map, barrier, column, 0, 0, tile * (ROWS / 16), EVICT_FIRST);
            } else {
                copy_box(target, w_map, barrier, column, tile * ROWS, EVICT_FIRST);
            }
        };
        const auto bring_x = [&](int step) {
            copy_box(ring + stage * Ring::STAGE_BYTES + W_BYTES, x_map, full + 8 * stage,
                     step % tile_steps * STEP, 0, EVICT_LAST);
        };
        const int ahead = min(first_step + STAGES, last_step);
        for (int step = first_step; step < ahead; step++, stage++) {
            bring_w(step);
        }
        wait_for_producer();
        release_consumer();
        stage = 0;
        for (int step = first_step; step < ahead; step++, stage++) {
            bring_x(step);
        }
        stage = 0;
        for (int step = ahead; step < last_step; step++) {
            wait_barrier(empty + 8 * stage, parity);
            bring_w(step);
            bring_x(step);
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
    } else if (threadIdx.x < WARPGROUP_SIZE) {
        wait_for_producer();
        release_consumer();
        float *staging =
            reinterpret_cast<float *>(shared + (ring - shared_address(shared)) +
                                      STAGES * Ring::STAGE_BYTES);
        for (int step = first_step; step < last_step;) {
            const int tile = step / tile_steps;
            const int tile_end = (tile + 1) * tile_steps;
            const int end = min(tile_end, last_step);
            const bool begins = step == tile * tile_steps;
            float sums[TOKENS / 2];
            int last_stage = 0;
            for (bool is_first = true; step < end; step++, is_first = false) {
                wait_barrier(full + 8 * stage, parity);
                const uint32_t start = ring + stage * Ring::STAGE_BYTES;
                const uint64_t w = describe_panels(start);
                const uint64_t x = describe_panels(start + W_BYTES);
                begin_products();
#pragma unroll
                for (int part = 0; part < STEP / PRODUCT_COLUMNS; part++) {
                    multiply_transposed<In, TOKENS>(sums, advance(w, part * PRODUCT_BYTES),
                                                    advance(x, part * PRODUCT_BYTES),
                                                    !is_first || part > 0);
                }
                commit_products();
                if (!is_first) {
                    wait_for_products<1>();
                    if (threadIdx.x == 0) {
                        arrive(empty + 8 * last_stage);
                    }
                }
                last_stage = stage;
                if (++stage == STAGES) {
                    stage = 0;
                    parity ^= 1;
                }
            }
            wait_for_products<0>();
            pin(sums);
            if (threadIdx.x == 0) {
                arrive(empty + 8 * last_stage);
            }
            if (!begins) {
                leave_sums(sums, partial, flags);
                continue;
            }
            if (end < tile_end) {
                add_sums(sums, partial, flags, tile_end, num_steps);
            }
            write_tile<In, T, Out, TOKENS, IS_SILU>(sums, staging, out, bias, scales, tile,
                                                    num_tokens, n);
        }
    }
}

#define ENTRIES_OF(T, SUFFIX, TOKENS)                                                              \
    extern "C" __global__ void __launch_bounds__(160, 1) gemm_stream_##SUFFIX##_t##TOKENS(         \
        const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, T *out,          \
        const T *bias, float *partial, uint32_t *flags, int num_tokens, int n, int k) {            \
        gemm_stream<T, T, T, TOKENS, false>(x, w, out, bias, {}, partial, flags, num_tokens, n,    \
                                            k);                                                    \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(160, 1) gemm_stream_##SUFFIX##_f32out_t##TOKENS(  \
        const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, float *out,      \
        const T *bias, float *partial, uint32_t *flags, int num_tokens, int n, int k) {            \
        gemm_stream<T, T, float, TOKENS, false>(x, w, out, bias, {}, partial, flags, num_tokens,   \
                                                n, k);                                             \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(160, 1) gemm_stream_silu_##SUFFIX##_t##TOKENS(    \
        const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, T *out,          \
        float *partial, uint32_t *flags, int num_tokens, int n, int k) {                           \
        gemm_stream<T, T, T, TOKENS, true>(x, w, out, nullptr, {}, partial, flags, num_tokens, n,  \
                                           k);                                                     \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(160, 1) gemm_stream_fp8_##SUFFIX##_t##TOKENS(     \
        const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, T *out,          \
        const T *bias, const float *x_scales, const float *w_scales, float *partial,               \
        uint32_t *flags, int num_tokens, int n, int k) {                                           \
        gemm_stream<E4m3Pair, T, T, TOKENS, false>(x, w, out, bias, {x_scales, w_scales}, partial, \
                                                   flags, num_tokens, n, k);                       \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(160, 1)                                           \
        gemm_stream_silu_fp8_##SUFFIX##_t##TOKENS(                                                 \
            const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, T *out,      \
            const float *x_scales, const float *w_scales, float *partial, uint32_t *flags,         \
            int num_tokens, int n, int k) {                                                        \
        gemm_stream<E4m3Pair, T, T, TOKENS, true>(x, w, out, nullptr, {x_scales, w_scales},        \
                                                  partial, flags, num_tokens, n, k);               \
    }
#define ENTRIES(T, SUFFIX)                                                                         \
    ENTRIES_OF(T, SUFFIX, 16)                                                                      \
    ENTRIES_OF(T, SUFFIX, 32)                                                                      \
    ENTRIES_OF(T, SUFFIX, 64)

ENTRIES(__half, f16)
ENTRIES(__nv_bfloat16, bf16)

#else

WITHOUT_HOPPER(gemm_stream)

#endif
