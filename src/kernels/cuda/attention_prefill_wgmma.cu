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
//          tiles of 128 (token, head) rows, one has TMA bring keys and values, 128 tokens a tile,
//          into two stages each; two warps bring the next tile's queries; two warpgroups of 64
//          rows multiply with wgmma. A warpgroup starts a tile's scores and the last tile's
//          weights · values together and turns scores into weights meanwhile, from one tile of
//          queries to the next without a pause; the two take turns to start products, so that one
//          multiplies while the other has exponentials to compute.
// Guard:   a barrier that is not passed for 17 s ends the launch with an illegal access.
#include "attention_prefill_wgmma.cuh"

#ifdef HAS_HOPPER

// A thread's two rows, lane / 4 and 8 further on.
struct Rows {
    // About the largest score so far (MAX_EXCESS), which weights are relative to.
    float max[2];
    float sum[2];
};

// A row's maximum stays while scores are over it by no more than this, as powers of two: sums so far
// are rescaled seldom, and weights stay below 2^8.
constexpr float MAX_EXCESS = 8.0f;

constexpr Rows FRESH_ROWS = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};

// What a thread keeps of a job.
struct Task {
    int num_tiles;
    // From this tile on a row may not see all keys.
    int first_masked;
    // The last key that each row sees, less the thread's first column.
    int last_key[2];
    // Tokens of the last tile's values that are after the sequence's end: the first, and how many.
    int first_unused;
    int num_unused;
    // Where each row's results begin; negative where it has none.
    int64_t target[2];
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
__device__ __forceinline__ void mask(float (&scores)[KEYS / 2], const Task &task, int first) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        if (i / 4 * 8 + i % 2 > task.last_key[i % 4 / 2] - first) {
            scores[i] = -INFINITY;
        }
    }
}

template <int COUNT> __device__ __forceinline__ void clear(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        registers[i] = 0.0f;
    }
}

// Turns scores into weights; `rescale` is what sums so far are to be multiplied by, if not 1. Every
// row sees key 0, so that its maximum is a number from the first tile on.
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
        const float excess = (max - rows.max[half]) * scale_log2;
        rescale[half] = excess > MAX_EXCESS ? exp2_fast(-excess) : 1.0f;
        rows.max[half] = excess > MAX_EXCESS ? max : rows.max[half];
        const float offset = rows.max[half] * scale_log2;
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
__device__ __forceinline__ void clear_unused(const Shared<D> &shared, const Task &task,
                                             int stage) {
    if (task.num_unused <= 0) {
        return;
    }
    constexpr int COLUMNS = D / 8;
    const int thread = threadIdx.x - WARPGROUP_SIZE;
    for (int i = thread; i < task.num_unused * COLUMNS; i += MULTIPLIER_THREADS) {
        store16(shared.values(stage) +
                    panel_offset(KEYS, task.first_unused + i / COLUMNS, i % COLUMNS),
                make_uint4(0, 0, 0, 0));
    }
    fence_for_async();
    sync_threads(ALL_MULTIPLIERS, MULTIPLIER_THREADS);
}

// Writes the warp's rows to where their job said.
template <typename T, int D>
__device__ __forceinline__ void write_rows(T *target, const float (&out)[D / 2],
                                           const int64_t (&offsets)[2], const float (&sums)[2]) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = sums[half];
        sum += __shfl_xor_sync(FULL_MASK, sum, 1);
        sum += __shfl_xor_sync(FULL_MASK, sum, 2);
        const float scale = __fdividef(1.0f, sum);
#pragma unroll
        for (int octet = 0; octet < D / 8; octet += 4) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = 4 * (octet + i) + 2 * half;
                words[i] = pack<T>(out[column] * scale, out[column + 1] * scale);
            }
            const uint4 packed = gather_octet(words[0], words[1], words[2], words[3]);
            if (offsets[half] >= 0) {
                store16(target + offsets[half] + 8 * (octet + lane % 4), packed);
            }
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

// Waits for a job and its queries. Returns false when there are no more.
template <typename T, int D>
__device__ __forceinline__ bool begin_task(const Shared<D> &shared, const Step<T> &step, int count,
                                           Task &task) {
    const int slot = slot_of(count);
    wait_barrier(shared_address(&shared.barriers->job_full[slot]), parity_of(count));
    const Job job = shared.jobs[slot];
    if (job.num_keys == 0) {
        return false;
    }
    wait_barrier(shared_address(&shared.barriers->query_full[slot]), parity_of(count));
    const int lane = threadIdx.x % WARP_SIZE;
    const int first_position = job.context_len - job.query_len;
    task.num_tiles = (job.num_keys + KEYS - 1) / KEYS;
    task.first_masked = (first_position + step.token_of(job.tile, 0) + 1) / KEYS;
    const int first_key = (task.num_tiles - 1) * KEYS;
    const int num_boxes = (job.num_keys - first_key + BOX_TOKENS - 1) / BOX_TOKENS;
    task.first_unused = job.context_len - first_key;
    task.num_unused = num_boxes * BOX_TOKENS - task.first_unused;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = threadIdx.x / WARP_SIZE * 16 - MULTIPLIER_ROWS + 8 * half + lane / 4;
        const int token = step.token_of(job.tile, row);
        // Rows beyond the last token see what it sees, and are not written.
        task.last_key[half] = min(first_position + token, job.num_keys - 1) - lane % 4 * 2;
        task.target[half] = token < job.query_len
                                ? step.template origin_of<D>(job) +
                                      step.template offset_of<D>(job.tile, row, token)
                                : -1;
    }
    return true;
}

// What a multiplying warpgroup does: it goes through the tiles of all its jobs, a job's last values
// together with the next job's first scores.
template <typename T, int D>
__device__ __forceinline__ void multiply_tiles(const Shared<D> &shared, const Step<T> &step,
                                               int multiplier) {
    constexpr int TILE_BYTES = Shared<D>::TILE_BYTES;
    Barriers &barriers = *shared.barriers;
    const uint64_t queries = describe_panels(shared_address(shared.queries(0)) +
                                             multiplier * MULTIPLIER_ROWS * PANEL_ROW_BYTES);
    const uint64_t keys = describe_panels(shared_address(shared.keys(0)));
    const uint64_t values =
        describe_panels(shared_address(shared.values(0)), Shared<D>::PANEL_BYTES);
    Task task;
    // How many jobs and tiles came before.
    int count = 0;
    int value = 0;
    if (!begin_task<T, D>(shared, step, count, task)) {
        return;
    }
    // The first one begins.
    if (multiplier == 1) {
        arrive_threads(TURN, MULTIPLIER_THREADS);
    }
    Rows rows = FRESH_ROWS;
    float scores[KEYS / 2];
    float out[D / 2];
    uint32_t weights[KEYS / 16][4];
    float rescale[2];
    int64_t target[2];
    float sums[2];
    clear<D / 2>(out);

    wait_barrier(shared_address(&barriers.key_full[0]), 0);
    begin_products();
    start_scores<T, D>(scores, queries, keys);
    commit_products();
    wait_for_products<0>();
    pin(scores);
    release(barriers.key_empty[0]);
    if (task.num_tiles == 1) {
        release(barriers.query_empty[0]);
    }
    if (task.first_masked == 0) {
        mask(scores, task, 0);
    }
    soften(scores, rows, rescale, step.scale_log2);
    pack_weights<T>(weights, scores);
    wait_barrier(shared_address(&barriers.value_full[0]), 0);

    // The tile whose scores are next.
    for (int tile = 1;; tile++, value++) {
        const bool is_end = tile == task.num_tiles;
        if (is_end) {
            clear_unused<D>(shared, task, slot_of(value));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                target[half] = task.target[half];
                sums[half] = rows.sum[half];
            }
            count++;
            if (!begin_task<T, D>(shared, step, count, task)) {
                break;
            }
            rows = FRESH_ROWS;
            tile = 0;
        }
        const int key = value + 1;
        wait_barrier(shared_address(&barriers.key_full[slot_of(key)]), parity_of(key));
        sync_threads(TURN + multiplier, MULTIPLIER_THREADS);
        pin(out);
        begin_products();
        start_scores<T, D>(scores, advance(queries, slot_of(count) * TILE_BYTES),
                           advance(keys, slot_of(key) * TILE_BYTES));
        commit_products();
        start_values<T, D>(out, weights, advance(values, slot_of(value) * TILE_BYTES));
        commit_products();
        arrive_threads(TURN + 1 - multiplier, MULTIPLIER_THREADS);
        wait_for_products<1>();
        pin(scores);
        release(barriers.key_empty[slot_of(key)]);
        if (tile == task.num_tiles - 1) {
            release(barriers.query_empty[slot_of(count)]);
        }
        if (tile >= task.first_masked) {
            mask(scores, task, tile * KEYS);
        }
        soften(scores, rows, rescale, step.scale_log2);
        const bool is_rescaled =
            __any_sync(FULL_MASK, rescale[0] != 1.0f || rescale[1] != 1.0f);
        // All of it while the products run: the pins and the loop of the next values' wait keep
        // the compiler from putting the products' wait before it.
        pin(scores);
        pin(rows.sum);
        wait_barrier(shared_address(&barriers.value_full[slot_of(key)]), parity_of(key));
        wait_for_products<0>();
        pin(out);
        release(barriers.value_empty[slot_of(value)]);
        if (is_end) {
            write_rows<T, D>(step.out, out, target, sums);
            clear<D / 2>(out);
        } else if (is_rescaled) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) {
                out[i] *= rescale[i % 4 / 2];
            }
        }
        pack_weights<T>(weights, scores);
    }

    pin(out);
    begin_products();
    start_values<T, D>(out, weights, advance(values, slot_of(value) * TILE_BYTES));
    commit_products();
    wait_for_products<0>();
    pin(out);
    write_rows<T, D>(step.out, out, target, sums);
    if (multiplier == 0) {
        sync_threads(TURN, MULTIPLIER_THREADS);
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
        } else if (warp == 1) {
            find_jobs<T, D>(shared, step);
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
