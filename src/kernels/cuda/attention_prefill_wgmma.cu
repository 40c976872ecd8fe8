// attention_prefill_wgmma: attention_prefill for compute capability 9.0, with the same queries,
// results, cache and index arrays (there), read through tensor maps.
//
// Shapes:  as attention_prefill; key_map and value_map are CUtensorMaps of the layer's k_cache and
//          v_cache as matrices [num_blocks · num_kv_heads · 2^block_shift, D] of 16-bit elements
//          with boxes of 16 rows × 64 columns and the 128-byte swizzle. counters u32 [2] are zero
//          before a launch and after it.
// Names:   attention_prefill_wgmma_{f16,bf16}_{64,128}; in the image of sm_90a alone.
// Launch:  grid (blocks), as many as there are multiprocessors or tiles · num_kv_heads if those
//          are fewer, tiles ≥ Σ ⌈query_len · group / 128⌉; block 384; dynamic shared memory
//          1536 · D + 1024 bytes (needs the opt-in). Blocks take tiles from a counter until there
//          are none, so any grid gives the same result.
// Scale:   scale_log2 = scale · log2(e).
// Method:  "FlashAttention-3" (Shah et al., 2024), sections 3.1 and 3.2; own code. A warp finds
//          tiles of 128 (token, head) rows and has TMA bring keys and values, 128 tokens a tile,
//          into two stages each; three warps bring the next tile's queries; two warpgroups of 64
//          rows multiply with wgmma. A warpgroup starts a tile's scores and the last tile's
//          weights · values together and turns scores into weights meanwhile; the two take turns
//          to start products, so that one multiplies while the other has exponentials to compute.
// Guard:   a barrier that is not passed for 17 s ends the launch with an illegal access.
#include "attention_prefill_wgmma.cuh"

#ifdef HAS_HOPPER

// A thread's two rows, lane / 4 and 8 further on.
struct Rows {
    float max[2];
    float sum[2];
    // The last key that the row sees, less the thread's first column.
    int last_key[2];
};

template <typename T, int D>
__device__ __forceinline__ void start_scores(float (&scores)[KEYS / 2], uint64_t queries,
                                             uint64_t keys) {
#pragma unroll
    for (int i = 0; i < D / PRODUCT_COLUMNS; i++) {
        const uint32_t offset = i / 4 * Shared<D>::PANEL_BYTES + i % 4 * PRODUCT_BYTES;
        multiply_transposed<T, KEYS>(scores, advance(queries, offset), advance(keys, offset),
                                     i > 0);
    }
}

template <typename T, int D>
__device__ __forceinline__ void start_values(float (&out)[D / 2],
                                             const uint32_t (&weights)[KEYS / 16][4],
                                             uint64_t values) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        multiply<T, D>(out, weights[i], advance(values, i * 16 * PANEL_ROW_BYTES));
    }
}

// Drops the keys that a row does not see; `first` is the tile's first key.
__device__ __forceinline__ void mask(float (&scores)[KEYS / 2], const Rows &rows, int first) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        if (i / 4 * 8 + i % 2 > rows.last_key[i % 4 / 2] - first) {
            scores[i] = -INFINITY;
        }
    }
}

// Turns scores into weights; `rescale` is what sums so far are to be multiplied by. Every row
// sees key 0, so that its maximum is a number from the first tile on.
__device__ __forceinline__ void soften(float (&scores)[KEYS / 2], Rows &rows, float (&rescale)[2],
                                       float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Four chains, which the GPU works on side by side.
        float maxima[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            maxima[i] = fmaxf(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]);
        }
#pragma unroll
        for (int i = 4; i < KEYS / 8; i++) {
            maxima[i % 4] = fmaxf(maxima[i % 4],
                                  fmaxf(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]));
        }
        float max = fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3]));
        max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, 1));
        max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, 2));
        max = fmaxf(max, rows.max[half]);
        rescale[half] = exp2_fast((rows.max[half] - max) * scale_log2);
        rows.max[half] = max;
        const float offset = max * scale_log2;
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
            for (int k = 4 * i + 2 * half; k < 4 * i + 2 * half + 2; k++) {
                scores[k] = exp2_fast(fmaf(scores[k], scale_log2, -offset));
                sums[k % 2] += scores[k];
            }
        }
        // Each thread sums its own keys; the lanes are added up once, at the end.
        rows.sum[half] = rows.sum[half] * rescale[half] + (sums[0] + sums[1]);
    }
}

template <typename T>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[KEYS / 16][4],
                                             const float (&scores)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            weights[i][k] = pack<T>(scores[8 * i + 2 * k], scores[8 * i + 2 * k + 1]);
        }
        pin(weights[i]);
    }
}

// Zeroes values after the sequence's end in the last tile's last block: weights there are zero,
// but what an unused slot holds may be NaN. All multipliers call it.
template <int D>
__device__ __forceinline__ void clear_unused(const Shared<D> &shared, const Job &job, int stage) {
    const int first = (job.num_keys - 1) / KEYS * KEYS;
    const int begin = job.context_len - first;
    const int end = (job.num_keys - first + BOX_TOKENS - 1) / BOX_TOKENS * BOX_TOKENS;
    if (begin >= end) {
        return;
    }
    const int thread = threadIdx.x - WARPGROUP_SIZE;
    for (int i = thread; i < (end - begin) * (D / 8); i += MULTIPLIERS * WARPGROUP_SIZE) {
        store16(shared.values(stage) + panel_offset(KEYS, begin + i / (D / 8), i % (D / 8)),
                make_uint4(0, 0, 0, 0));
    }
    fence_for_async();
    sync_threads(ALL_MULTIPLIERS, MULTIPLIERS * WARPGROUP_SIZE);
}

// Writes the warp's rows, through its own rows of the queries' tile, so that stores are 16 bytes.
template <typename T, int D>
__device__ __forceinline__ void write_rows(const Step<T> &step, const Job &job, char *queries,
                                           const float (&out)[D / 2], const Rows &rows) {
    constexpr int COLUMNS = D / 8;
    const int lane = threadIdx.x % WARP_SIZE;
    const int first_row = threadIdx.x / WARP_SIZE * 16 - MULTIPLIER_ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(FULL_MASK, sum, 1);
        sum += __shfl_xor_sync(FULL_MASK, sum, 2);
        const float scale = __fdividef(1.0f, sum);
        const int row = first_row + 8 * half + lane / 4;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            *reinterpret_cast<uint32_t *>(queries + panel_offset(ROWS, row, j) + 4 * (lane % 4)) =
                pack<T>(out[4 * j + 2 * half] * scale, out[4 * j + 2 * half + 1] * scale);
        }
    }
    __syncwarp();
    T *target = step.out + step.template origin_of<D>(job);
#pragma unroll
    for (int i = lane; i < 16 * COLUMNS; i += WARP_SIZE) {
        const int row = first_row + i / COLUMNS;
        const int token = step.token_of(job.tile, row);
        if (token < job.query_len) {
            store16(target + step.template offset_of<D>(job.tile, row, token) + i % COLUMNS * 8,
                    load16(queries + panel_offset(ROWS, row, i % COLUMNS)));
        }
    }
}

// Says that the warp has no more use for a slot or stage.
__device__ __forceinline__ void release(const uint64_t &barrier) {
    __syncwarp();
    if (threadIdx.x % WARP_SIZE == 0) {
        arrive(shared_address(&barrier));
    }
}

// Computes a warpgroup's rows of a job. `num_used` tiles of keys were used before it.
template <typename T, int D>
__device__ __forceinline__ void attend(const Shared<D> &shared, const Step<T> &step,
                                       const Job &job, int slot, int num_used, int multiplier) {
    constexpr int TILE_BYTES = Shared<D>::TILE_BYTES;
    Barriers &barriers = *shared.barriers;
    const int first_position = job.context_len - job.query_len;
    const int num_tiles = (job.num_keys + KEYS - 1) / KEYS;
    // From here on a row may not see all keys of a tile.
    const int first_masked = (first_position + step.token_of(job.tile, 0) + 1) / KEYS;
    const uint64_t queries = describe_panels(shared_address(shared.queries(slot)) +
                                             multiplier * MULTIPLIER_ROWS * PANEL_ROW_BYTES);
    const uint64_t keys = describe_panels(shared_address(shared.keys(0)));
    const uint64_t values =
        describe_panels(shared_address(shared.values(0)), Shared<D>::PANEL_BYTES);

    Rows rows;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int lane = threadIdx.x % WARP_SIZE;
        const int row = threadIdx.x / WARP_SIZE * 16 - MULTIPLIER_ROWS + 8 * half + lane / 4;
        // Rows beyond the last token see what it sees, and are not written.
        const int position = first_position + step.token_of(job.tile, row);
        rows.last_key[half] = min(position, job.num_keys - 1) - lane % 4 * 2;
        rows.max[half] = -INFINITY;
        rows.sum[half] = 0.0f;
    }
    float scores[KEYS / 2];
    float out[D / 2];
    uint32_t weights[KEYS / 16][4];
    float rescale[2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
        out[i] = 0.0f;
    }

    int key = num_used;
    wait_barrier(shared_address(&barriers.key_full[slot_of(key)]), parity_of(key));
    begin_products();
    start_scores<T, D>(scores, queries, advance(keys, slot_of(key) * TILE_BYTES));
    commit_products();
    wait_for_products<0>();
    pin(scores);
    release(barriers.key_empty[slot_of(key)]);
    if (first_masked == 0) {
        mask(scores, rows, 0);
    }
    soften(scores, rows, rescale, step.scale_log2);
    pack_weights<T>(weights, scores);
    wait_barrier(shared_address(&barriers.value_full[slot_of(key)]), parity_of(key));

    for (int tile = 1; tile < num_tiles; tile++) {
        const int value = key;
        key++;
        wait_barrier(shared_address(&barriers.key_full[slot_of(key)]), parity_of(key));
        sync_threads(TURN + multiplier, MULTIPLIERS * WARPGROUP_SIZE);
        pin(out);
        begin_products();
        start_scores<T, D>(scores, queries, advance(keys, slot_of(key) * TILE_BYTES));
        commit_products();
        start_values<T, D>(out, weights, advance(values, slot_of(value) * TILE_BYTES));
        commit_products();
        arrive_threads(TURN + 1 - multiplier, MULTIPLIERS * WARPGROUP_SIZE);
        wait_for_products<1>();
        pin(scores);
        release(barriers.key_empty[slot_of(key)]);
        if (tile >= first_masked) {
            mask(scores, rows, tile * KEYS);
        }
        soften(scores, rows, rescale, step.scale_log2);
        // All of it while the products run: the pins and the loop of the next values' wait keep
        // the compiler from putting the products' wait before it.
        pin(scores);
        pin(rows.sum);
        wait_barrier(shared_address(&barriers.value_full[slot_of(key)]), parity_of(key));
        wait_for_products<0>();
        pin(out);
        release(barriers.value_empty[slot_of(value)]);
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            out[i] *= rescale[i % 4 / 2];
        }
        pack_weights<T>(weights, scores);
    }

    clear_unused<D>(shared, job, slot_of(key));
    pin(out);
    begin_products();
    start_values<T, D>(out, weights, advance(values, slot_of(key) * TILE_BYTES));
    commit_products();
    wait_for_products<0>();
    pin(out);
    release(barriers.value_empty[slot_of(key)]);
    // All warps of the warpgroup have multiplied with the queries.
    sync_threads(MULTIPLIER + multiplier, WARPGROUP_SIZE);
    write_rows<T, D>(step, job, shared.queries(slot), out, rows);
    release(barriers.query_empty[slot]);
}

// What a multiplying warpgroup does.
template <typename T, int D>
__device__ __forceinline__ void multiply_tiles(const Shared<D> &shared, const Step<T> &step,
                                               int multiplier) {
    constexpr int NUM_THREADS = MULTIPLIERS * WARPGROUP_SIZE;
    // The first one begins.
    if (multiplier == 1) {
        arrive_threads(TURN, NUM_THREADS);
    }
    int num_used = 0;
    for (int count = 0;; count++) {
        const int slot = slot_of(count);
        wait_barrier(shared_address(&shared.barriers->job_full[slot]), parity_of(count));
        const Job job = shared.jobs[slot];
        if (job.num_keys == 0) {
            break;
        }
        wait_barrier(shared_address(&shared.barriers->query_full[slot]), parity_of(count));
        attend<T, D>(shared, step, job, slot, num_used, multiplier);
        num_used += (job.num_keys + KEYS - 1) / KEYS;
    }
    if (multiplier == 0) {
        sync_threads(TURN, NUM_THREADS);
    }
}

__device__ __forceinline__ void init_barriers(Barriers &barriers) {
    for (int i = 0; i < 2; i++) {
        init_barrier(shared_address(&barriers.job_full[i]), 1);
        init_barrier(shared_address(&barriers.query_full[i]), QUERY_THREADS);
        init_barrier(shared_address(&barriers.query_empty[i]), MULTIPLIER_WARPS);
        init_barrier(shared_address(&barriers.key_full[i]), 1);
        init_barrier(shared_address(&barriers.key_empty[i]), MULTIPLIER_WARPS);
        init_barrier(shared_address(&barriers.value_full[i]), 1);
        init_barrier(shared_address(&barriers.value_empty[i]), MULTIPLIER_WARPS);
    }
    fence_barrier_init();
}

template <typename T, int D>
__device__ __forceinline__ void attention_prefill_wgmma(const Step<T> &step) {
    extern __shared__ __align__(128) char dynamic[];
    __shared__ Barriers barriers;
    __shared__ Job jobs[2];
    const uint32_t start = shared_address(dynamic);
    const Shared<D> shared = {dynamic + (panel_address(start) - start), &barriers, jobs};
    if (threadIdx.x == 0) {
        prefetch_map(*step.key_map);
        prefetch_map(*step.value_map);
        init_barriers(barriers);
    }
    __syncthreads();
    wait_for_producer();
    release_consumer();
    // The same in all lanes, and known to be by the compiler.
    const int warp = __shfl_sync(FULL_MASK, threadIdx.x / WARP_SIZE, 0);
    const int warpgroup = warp / (WARPGROUP_SIZE / WARP_SIZE);
    if (warpgroup == 0) {
        give_registers<BRINGER_REGISTERS>();
        if (warp == 0) {
            bring_keys<T, D>(shared, step);
        } else {
            bring_queries<T, D>(shared, step);
        }
    } else {
        take_registers<MULTIPLIER_REGISTERS>();
        multiply_tiles<T, D>(shared, step, warpgroup - 1);
    }
}

#define ENTRY(T, SUFFIX, D)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                       \
        attention_prefill_wgmma_##SUFFIX##_##D(                                                    \
        T *out, const T *q, const __grid_constant__ TensorMap key_map,                             \
        const __grid_constant__ TensorMap value_map, const int *cu_seqlens_q,                      \
        const int *context_lens, const int *block_tables, const int *cu_blocks,                    \
        uint32_t *counters, float scale_log2, int num_sequences, int min_query_len, int num_heads, \
        int num_kv_heads, int block_shift) {                                                       \
        const int group = num_heads / num_kv_heads;                                                \
        attention_prefill_wgmma<T, D>({out, q, &key_map, &value_map, cu_seqlens_q, context_lens,   \
                                       block_tables, cu_blocks, counters, scale_log2,              \
                                       num_sequences, min_query_len, num_heads, num_kv_heads,      \
                                       block_shift, group, ((1u << 31) + group - 1) / group});     \
    }

ENTRY(__half, f16, 64)
ENTRY(__half, f16, 128)
ENTRY(__nv_bfloat16, bf16, 64)
ENTRY(__nv_bfloat16, bf16, 128)

#else

WITHOUT_HOPPER(attention_prefill_wgmma)

#endif
