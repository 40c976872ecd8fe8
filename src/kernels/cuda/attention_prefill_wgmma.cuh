// attention_prefill_wgmma's tiles of queries, in which order they are taken, what they are held in,
// and the warpgroup that brings them and their keys and values; attention_prefill_wgmma.cu has the
// warpgroups that multiply.
//
// The rows of a tile are (token, head of a kv head's group) pairs, token by token: row r of tile t
// is head (128 t + r) % group of token (128 t + r) / group.
#pragma once

#include "hopper.cuh"

#ifdef HAS_HOPPER

// Rows of a tile of queries.
constexpr int ROWS = 128;
// Tokens of a tile of keys or values, and of a box.
constexpr int KEYS = 128;
constexpr int BOX_TOKENS = 16;
constexpr int NUM_BOXES = KEYS / BOX_TOKENS;   // Of a panel.
constexpr int STAGES = 2;
constexpr int MULTIPLIERS = 2;             // Warpgroups that multiply; one more brings data.
constexpr int THREADS = (MULTIPLIERS + 1) * WARPGROUP_SIZE;
constexpr int MULTIPLIER_ROWS = ROWS / MULTIPLIERS;
constexpr int MULTIPLIER_THREADS = MULTIPLIERS * WARPGROUP_SIZE;
constexpr int MULTIPLIER_WARPS = MULTIPLIER_THREADS / WARP_SIZE;
constexpr int QUERY_THREADS = WARPGROUP_SIZE - 2 * WARP_SIZE;
static_assert(MULTIPLIER_ROWS == 64, "wgmma has 64 rows");
// 65,536 registers in all.
constexpr int BRINGER_REGISTERS = 40;
constexpr int MULTIPLIER_REGISTERS = 232;
// Outside of any tensor: boxes there are zeros.
constexpr int NO_ROW = -BOX_TOKENS;

// Barriers of sync_threads.
constexpr int ALL_MULTIPLIERS = 1;
constexpr int TURN = 2;                    // + multiplier.

// A tile of queries. num_keys is how many its last row sees; 0 when there are no more tiles.
struct Job {
    int kv_head;
    int tile;
    int query_start;
    int query_len;
    int context_len;
    // Where the sequence's blocks begin in block_tables.
    int first_block;
    int num_keys;
};

// Barriers in shared memory, each for two slots or stages.
struct Barriers {
    uint64_t job_full[2];
    uint64_t query_full[2];
    // The slot's queries and job are not needed any more.
    uint64_t query_empty[2];
    uint64_t key_full[STAGES];
    uint64_t key_empty[STAGES];
    uint64_t value_full[STAGES];
    uint64_t value_empty[STAGES];
};

// Shared memory of a block.
template <int D> struct Shared {
    static constexpr int PANELS = D / PANEL_COLUMNS;
    static constexpr int PANEL_BYTES = KEYS * PANEL_ROW_BYTES;
    static constexpr int TILE_BYTES = PANELS * PANEL_BYTES;
    static_assert(KEYS == ROWS, "tiles of queries are as large as those of keys");

    char *tiles;
    Barriers *barriers;
    Job *jobs;

    __device__ __forceinline__ char *queries(int slot) const { return tiles + slot * TILE_BYTES; }
    __device__ __forceinline__ char *keys(int stage) const {
        return tiles + (2 + stage) * TILE_BYTES;
    }
    __device__ __forceinline__ char *values(int stage) const {
        return tiles + (2 + STAGES + stage) * TILE_BYTES;
    }
};

// What a launch works on.
template <typename T> struct Step {
    T *out;
    const T *q;
    const TensorMap *key_map;
    const TensorMap *value_map;
    const int *cu_seqlens_q;
    const int *context_lens;
    const int *block_tables;
    const int *cu_blocks;
    uint32_t *counters;
    float scale_log2;
    int num_sequences;
    int min_query_len;
    int num_heads;
    int num_kv_heads;
    int block_shift;
    int group_size;
    // ⌈2^31 / group_size⌉.
    uint32_t reciprocal;

    // Returns the token of row `row` of tile `tile`: the quotient by group_size, exact below
    // 2^27 rows for groups up to 16. 2^31 + e = reciprocal · group_size with e < group_size, so
    // the product is over the quotient by rows · e / group_size / 2^31 < 1 / group_size.
    __device__ __forceinline__ int token_of(int tile, int row) const {
        return __umulhi(2 * (tile * ROWS + row), reciprocal);
    }
    // Returns the offset of the row's first element, of queries or results, given its token.
    template <int D>
    __device__ __forceinline__ int64_t offset_of(int tile, int row, int token) const {
        return (int64_t)token * (num_heads * D) + (tile * ROWS + row - token * group_size) * D;
    }
    // Returns the same of the job's first token and head.
    template <int D> __device__ __forceinline__ int64_t origin_of(const Job &job) const {
        return (int64_t)job.query_start * (num_heads * D) + job.kv_head * group_size * D;
    }
};

// A running count of uses of two slots: slot and parity of the barriers' phase of use `count`.
__device__ __forceinline__ int slot_of(int count) { return count % 2; }
__device__ __forceinline__ uint32_t parity_of(int count) { return count / 2 % 2; }

// Has TMA bring a tile of keys or values once its stage is free. Each lane has a box, the same
// panel's one after another; `row` is its first row in the cache.
template <int D>
__device__ __forceinline__ void bring_tile(char *target, const TensorMap &map, int row,
                                           const uint64_t &full, const uint64_t &empty,
                                           int count) {
    constexpr int PANELS = Shared<D>::PANELS;
    const int lane = threadIdx.x % WARP_SIZE;
    const uint32_t barrier = shared_address(&full);
    wait_barrier(shared_address(&empty), parity_of(count) ^ 1);
    if (lane == 0) {
        arrive_expecting(barrier, Shared<D>::TILE_BYTES);
    }
    __syncwarp();
    if (lane < NUM_BOXES * PANELS) {
        const int panel = lane / NUM_BOXES;
        const uint32_t offset = lane % NUM_BOXES * BOX_TOKENS * PANEL_ROW_BYTES;
        copy_box(shared_address(target) + panel * Shared<D>::PANEL_BYTES + offset, map, barrier,
                 panel * PANEL_COLUMNS, row, EVICT_NORMAL);
    }
}

// A sequence's tiles of queries.
struct Sequence {
    int query_start;
    int query_len;
    int context_len;
    // Where its blocks begin in block_tables.
    int first_block;
    // 0 where another kernel has its queries.
    int num_tiles;

    // Returns how many tiles of keys tile `tile` sees.
    template <typename T>
    __device__ __forceinline__ int level_of(const Step<T> &step, int tile) const {
        const int last_token = min(step.token_of(tile, ROWS - 1), query_len - 1);
        return (context_len - query_len + last_token + KEYS) / KEYS;
    }
    // Returns the first tile that sees so many or more, num_tiles if none does: the one that has
    // the first row of the first token that sees a key of that tile of keys.
    template <typename T>
    __device__ __forceinline__ int first_of(const Step<T> &step, int level) const {
        const int token = (level - 1) * KEYS - (context_len - query_len);
        return token <= 0 ? 0 : token < query_len ? token * step.group_size / ROWS : num_tiles;
    }
};

template <typename T>
__device__ __forceinline__ Sequence sequence_of(const Step<T> &step, int sequence) {
    if (sequence >= step.num_sequences) {
        return {0, 0, 0, 0, 0};
    }
    const int start = step.cu_seqlens_q[sequence];
    const int len = step.cu_seqlens_q[sequence + 1] - start;
    const bool is_here = len >= max(step.min_query_len, 1);
    return {start, len, step.context_lens[sequence], step.cu_blocks[sequence],
            is_here ? (len * step.group_size + ROWS - 1) / ROWS : 0};
}

// The order in which tiles of queries are taken: those that see most tiles of keys ("level") first,
// through all sequences, so that blocks end together. A warp goes through it.
template <typename T> struct Queue {
    const Step<T> &step;
    // Tiles before this level and in it, and the greatest level below; 0 is none.
    int level;
    int num_before;
    int num_here;
    int next_level;

    __device__ __forceinline__ explicit Queue(const Step<T> &step) : step(step), num_before(0) {
        const int lane = threadIdx.x % WARP_SIZE;
        int greatest = 0;
        for (int first = 0; first < step.num_sequences; first += WARP_SIZE) {
            const Sequence sequence = sequence_of(step, first + lane);
            if (sequence.num_tiles > 0) {
                greatest = max(greatest, sequence.level_of(step, sequence.num_tiles - 1));
            }
        }
        go_to(__reduce_max_sync(FULL_MASK, greatest));
    }

    __device__ __forceinline__ void go_to(int new_level) {
        const int lane = threadIdx.x % WARP_SIZE;
        int count = 0;
        int below = 0;
        for (int first = 0; first < step.num_sequences; first += WARP_SIZE) {
            const Sequence sequence = sequence_of(step, first + lane);
            const int begin = min(sequence.first_of(step, new_level), sequence.num_tiles);
            const int end = min(sequence.first_of(step, new_level + 1), sequence.num_tiles);
            count += end - begin;
            if (begin > 0) {
                below = max(below, sequence.level_of(step, begin - 1));
            }
        }
        level = new_level;
        num_here = __reduce_add_sync(FULL_MASK, count);
        next_level = __reduce_max_sync(FULL_MASK, below);
    }

    // Finds the tile numbered `index`, not smaller than in the call before. Returns false when
    // there is none.
    __device__ __forceinline__ bool find(int index, Sequence &found, int &tile) {
        while (level > 0 && index >= num_before + num_here) {
            num_before += num_here;
            go_to(next_level);
        }
        if (level == 0) {
            return false;
        }
        const int lane = threadIdx.x % WARP_SIZE;
        int rest = index - num_before;
        for (int first = 0;; first += WARP_SIZE) {
            const Sequence sequence = sequence_of(step, first + lane);
            const int begin = min(sequence.first_of(step, level), sequence.num_tiles);
            const int end = min(sequence.first_of(step, level + 1), sequence.num_tiles);
            int after = end - begin;
#pragma unroll
            for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
                const int other = __shfl_up_sync(FULL_MASK, after, offset);
                after += lane >= offset ? other : 0;
            }
            const uint32_t beyond = __ballot_sync(FULL_MASK, rest < after);
            if (beyond != 0) {
                const int source = __ffs(beyond) - 1;
                const auto from = [&](int value) {
                    return __shfl_sync(FULL_MASK, value, source);
                };
                tile = from(end - (after - rest));
                found = {from(sequence.query_start), from(sequence.query_len),
                         from(sequence.context_len), from(sequence.first_block),
                         from(sequence.num_tiles)};
                return true;
            }
            rest -= __shfl_sync(FULL_MASK, after, WARP_SIZE - 1);
        }
    }
};

// What the second warp does: finds the block's jobs and publishes each once its slot is free, while
// the job before is worked on.
template <typename T, int D>
__device__ __forceinline__ void find_jobs(const Shared<D> &shared, const Step<T> &step) {
    const int lane = threadIdx.x % WARP_SIZE;
    Queue<T> queue(step);
    int index = blockIdx.x;
    for (int count = 0;; count++) {
        Job job = {index % step.num_kv_heads, 0, 0, 0, 0, 0, 0};
        Sequence sequence;
        if (queue.find(index / step.num_kv_heads, sequence, job.tile)) {
            job.query_start = sequence.query_start;
            job.query_len = sequence.query_len;
            job.context_len = sequence.context_len;
            job.first_block = sequence.first_block;
            const int last_token = min(step.token_of(job.tile, ROWS - 1), job.query_len - 1);
            job.num_keys = job.context_len - job.query_len + last_token + 1;
        }
        if (lane == 0) {
            shared.jobs[slot_of(count)] = job;
            arrive(shared_address(&shared.barriers->job_full[slot_of(count)]));
        }
        if (job.num_keys == 0) {
            break;
        }
        wait_barrier(shared_address(&shared.barriers->query_empty[slot_of(count + 1)]),
                     parity_of(count + 1) ^ 1);
        if (lane == 0) {
            index = gridDim.x + atomicAdd(step.counters, 1u);
        }
        index = __shfl_sync(FULL_MASK, index, 0);
    }
    // The last block to come here has seen all others' requests.
    if (lane == 0) {
        __threadfence();
        if (atomicAdd(step.counters + 1, 1u) == gridDim.x - 1) {
            step.counters[0] = 0;
            step.counters[1] = 0;
        }
    }
}

// What the first warp does: brings keys and values.
template <typename T, int D>
__device__ __forceinline__ void bring_keys(const Shared<D> &shared, const Step<T> &step) {
    const int lane = threadIdx.x % WARP_SIZE;
    Barriers &barriers = *shared.barriers;
    int num_brought = 0;
    for (int count = 0;; count++) {
        wait_barrier(shared_address(&barriers.job_full[slot_of(count)]), parity_of(count));
        const Job job = shared.jobs[slot_of(count)];
        if (job.num_keys == 0) {
            break;
        }
        const int *block_table = step.block_tables + job.first_block;
        const int num_tiles = (job.num_keys + KEYS - 1) / KEYS;
        const int box_token = lane % NUM_BOXES * BOX_TOKENS;
        // The block of the lane's box; looked up one tile ahead.
        const auto block_of = [&](int tile) {
            const int token = tile * KEYS + box_token;
            return token < job.num_keys ? block_table[token >> step.block_shift] : -1;
        };
        int value_row = NO_ROW;
        int block = block_of(0);
        // In the order in which they are used: keys of a tile, values of the tile before.
        for (int tile = 0; tile <= num_tiles; tile++) {
            const int slot = (tile * KEYS + box_token) & ((1 << step.block_shift) - 1);
            const int row =
                block >= 0
                    ? ((block * step.num_kv_heads + job.kv_head) << step.block_shift) + slot
                    : NO_ROW;
            block = block_of(tile + 1);
            if (tile < num_tiles) {
                const int key = num_brought + tile;
                bring_tile<D>(shared.keys(slot_of(key)), *step.key_map, row,
                              barriers.key_full[slot_of(key)], barriers.key_empty[slot_of(key)],
                              key);
            }
            if (tile > 0) {
                const int value = num_brought + tile - 1;
                bring_tile<D>(shared.values(slot_of(value)), *step.value_map, value_row,
                              barriers.value_full[slot_of(value)],
                              barriers.value_empty[slot_of(value)], value);
            }
            value_row = row;
        }
        num_brought += num_tiles;
    }
}

// What the other warps of the first warpgroup do: bring queries.
template <typename T, int D>
__device__ __forceinline__ void bring_queries(const Shared<D> &shared, const Step<T> &step) {
    constexpr int COLUMNS = D / 8;
    const int thread = threadIdx.x - (WARPGROUP_SIZE - QUERY_THREADS);
    for (int count = 0;; count++) {
        const int slot = slot_of(count);
        // The slot is free too: the job was published after that.
        wait_barrier(shared_address(&shared.barriers->job_full[slot]), parity_of(count));
        const Job job = shared.jobs[slot];
        if (job.num_keys == 0) {
            break;
        }
        const T *q = step.q + step.template origin_of<D>(job);
        const uint32_t target = shared_address(shared.queries(slot));
        for (int i = thread; i < ROWS * COLUMNS; i += QUERY_THREADS) {
            const int row = i / COLUMNS;
            const int column = i % COLUMNS;
            const int token = step.token_of(job.tile, row);
            const bool is_there = token < job.query_len;
            const int64_t offset =
                is_there ? step.template offset_of<D>(job.tile, row, token) + 8 * column : 0;
            copy16_async(target + panel_offset(ROWS, row, column), q + offset, is_there);
        }
        commit_copies();
        wait_for_copies<0>();
        fence_for_async();
        arrive(shared_address(&shared.barriers->query_full[slot]));
    }
}

#endif
