// attention_prefill: chunks of query tokens against paged keys and values, causal, many sequences
// of different lengths in one launch (prompts, chunks after a cached prefix, decodes as well).
//
// Shapes:  q, out [tokens, num_heads, D]; k_cache, v_cache
//          [num_blocks][num_kv_heads][2^block_shift][D], block_shift ≥ 4; all of type T, or with
//          fp8 in the name the caches of E4M3, whose products are those of T.
//          cu_seqlens_q i32 [sequences + 1], context_lens i32 [sequences] (this step's tokens
//          included, which are the last ones), block_tables i32 ragged, cu_blocks i32
//          [sequences + 1]: as AttentionBatch, or a range of its sequences, whose first entries then
//          need not be 0. Query token i of a sequence stands at position
//          context_len − query_len + i and sees keys 0 to there.
//          Sequences of fewer than min_query_len query tokens are left alone: 2 leaves decodes to
//          attention_decode, 1 takes all; padding (0) is always left.
// Names:   attention_prefill_{f16,bf16}_{64,128}, attention_prefill_fp8_{f16,bf16}_{64,128}.
// Launch:  grid (num_kv_heads, tiles), tiles ≥ Σ ⌈query_len · group / 128⌉, group = num_heads /
//          num_kv_heads, block 128; dynamic shared memory 768 · D bytes, with fp8 640 · D (both need
//          the opt-in).
//          Blocks without a tile return at once, so a bucket may launch its upper bound
//          ⌈tokens · group / 128⌉ + sequences.
// Scale:   scale_log2 = scale · log2(e).
// Method:  "FlashAttention-2" (Dao, 2023) with mma.sync; own code. The rows of a tile are (token,
//          head) pairs of one kv head's group, so that the heads share the keys in shared memory
//          and short chunks fill their tile. 4 warps of 32 rows; keys and values come in tiles of
//          64 tokens through two stages of cp.async; 16-byte columns are swizzled by the row. Keys
//          and values of E4M3 come in through one stage of their own, from which the threads widen
//          them to T in the one pair of tiles before each product.
#include "e4m3_pairs.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP_SIZE;
constexpr int ROW_TILES = 2;               // Tiles of 16 rows of a warp.
constexpr int ROWS = WARPS * ROW_TILES * 16;
constexpr int KEYS = 64;
constexpr int KEY_TILES = KEYS / 8;

// What a block works on.
struct Work {
    int sequence;
    int tile;
    int query_start;
    int query_len;
};

// Finds the block's tile: tiles are numbered through the sequences, within one from its end,
// where rows see most keys. sequence is -1 when there is none. One warp calls it.
__device__ __forceinline__ Work find_work(int index, const int *cu_seqlens_q, int num_sequences,
                                          int min_query_len, int group_size) {
    const int lane = threadIdx.x % WARP_SIZE;
    for (int first = 0; first < num_sequences; first += WARP_SIZE) {
        const int sequence = first + lane;
        int start = 0;
        int len = 0;
        if (sequence < num_sequences) {
            start = cu_seqlens_q[sequence];
            len = cu_seqlens_q[sequence + 1] - start;
        }
        const int tiles = len >= min_query_len ? (len * group_size + ROWS - 1) / ROWS : 0;
        int before = tiles;
#pragma unroll
        for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
            const int other = __shfl_up_sync(FULL_MASK, before, offset);
            before += lane >= offset ? other : 0;
        }
        before -= tiles;
        const uint32_t found =
            __ballot_sync(FULL_MASK, index >= before && index < before + tiles);
        if (found != 0) {
            const int source = __ffs(found) - 1;
            Work work;
            work.sequence = first + source;
            work.tile = __shfl_sync(FULL_MASK, tiles - 1 - (index - before), source);
            work.query_start = __shfl_sync(FULL_MASK, start, source);
            work.query_len = __shfl_sync(FULL_MASK, len, source);
            return work;
        }
        index -= __shfl_sync(FULL_MASK, before + tiles, WARP_SIZE - 1);
    }
    return {-1, 0, 0, 0};
}

// Returns the byte offset of 16-byte column `column` of row `row` in a tile of rows of D elements.
template <int D> __device__ __forceinline__ uint32_t swizzled(int row, int column) {
    return row * (2 * D) + ((column ^ (row & 7)) << 4);
}

// Where a sequence's keys and values are.
template <typename E> struct Cache {
    const E *keys;
    const E *values;
    const int *block_table;
    int num_keys;
    int kv_head;
    int num_kv_heads;
    int block_shift;

    // Returns where `token`'s elements of D begin; 0 where there is no such token.
    template <int D> __device__ __forceinline__ int64_t offset_of(int token) const {
        if (token >= num_keys) {
            return 0;
        }
        const int64_t block = block_table[token >> block_shift];
        const int slot = token & ((1 << block_shift) - 1);
        return (((block * num_kv_heads + kv_head) << block_shift) + slot) * D;
    }
};

// Starts the copies of keys and values from token `first` on.
template <typename T, int D>
__device__ __forceinline__ void copy_keys(uint32_t key_tile, uint32_t value_tile,
                                          const Cache<T> &cache, int first) {
    constexpr int COLUMNS = D / 8;
    constexpr int STRIDE = THREADS / COLUMNS;
    const int column = threadIdx.x % COLUMNS;
    const int first_row = threadIdx.x / COLUMNS;
#pragma unroll
    for (int i = 0; i < KEYS / STRIDE; i++) {
        const int row = first_row + i * STRIDE;
        const int token = first + row;
        const bool is_there = token < cache.num_keys;
        const int64_t offset = cache.template offset_of<D>(token) + 8 * column;
        copy16_async(key_tile + swizzled<D>(row, column), cache.keys + offset, is_there);
        copy16_async(value_tile + swizzled<D>(row, column), cache.values + offset, is_there);
    }
}

// Which vectors of 16 codes of a tile a thread brings and widens: in round i column `column` of row
// `row` + i · STRIDE. Eight lanes have four columns of an even row and of the next, so that their
// columns of T, swizzled, lie in all banks.
template <int D> struct Codes {
    static constexpr int HALVES = D / 64;
    static constexpr int STRIDE = THREADS / (4 * HALVES);
    static constexpr int ROUNDS = KEYS / STRIDE;
    static constexpr int TILE_BYTES = KEYS * D;
    int row;
    int column;

    __device__ __forceinline__ Codes() {
        const int lane = threadIdx.x % WARP_SIZE;
        row = threadIdx.x / WARP_SIZE * (8 / HALVES) + lane / 4 % 2 + lane / (8 * HALVES) * 2;
        column = lane % 4 + lane / 8 % HALVES * 4;
    }

    // Returns where the thread's vector of round `i` lies; no other thread's.
    __device__ __forceinline__ int place(int i) const { return (i * THREADS + threadIdx.x) * 16; }
};

// Starts the copies of codes from token `first` on, keys to `codes`, values behind them.
template <int D>
__device__ __forceinline__ void copy_codes(uint32_t codes, const Cache<E4m3> &cache, int first) {
    const Codes<D> own;
#pragma unroll
    for (int i = 0; i < Codes<D>::ROUNDS; i++) {
        const int token = first + own.row + i * Codes<D>::STRIDE;
        const bool is_there = token < cache.num_keys;
        const int64_t offset = cache.template offset_of<D>(token) + 16 * own.column;
        const uint32_t target = codes + own.place(i);
        copy16_async(target, cache.keys + offset, is_there);
        copy16_async(target + Codes<D>::TILE_BYTES, cache.values + offset, is_there);
    }
}

// Widens the codes that the thread itself has copied to tiles of T, of keys and behind them values.
template <typename T, int D>
__device__ __forceinline__ void widen_codes(char *tiles, const char *codes) {
    const Codes<D> own;
#pragma unroll
    for (int kind = 0; kind < 2; kind++) {
#pragma unroll
        for (int i = 0; i < Codes<D>::ROUNDS; i++) {
            uint4 first, second;
            widen16<T>(load16(codes + kind * Codes<D>::TILE_BYTES + own.place(i)), first, second);
            const int row = own.row + i * Codes<D>::STRIDE;
            char *tile = tiles + kind * (KEYS * D * 2);
            store16(tile + swizzled<D>(row, 2 * own.column), first);
            store16(tile + swizzled<D>(row, 2 * own.column + 1), second);
        }
    }
}

// A warp's rows: of each tile of 16, a thread has rows group and group + 8.
template <int D> struct State {
    float max[ROW_TILES][2];
    float sum[ROW_TILES][2];
    float out[ROW_TILES][D / 8][4];
};

template <typename T, int D>
__device__ __forceinline__ void score(float (&scores)[ROW_TILES][KEY_TILES][4],
                                      uint32_t query_tile, uint32_t key_tile) {
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
        for (int j = 0; j < KEY_TILES; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                scores[i][j][k] = 0.0f;
            }
        }
    }
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t q[ROW_TILES][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            const int row = (warp * ROW_TILES + i) * 16 + lane % 16;
            load_matrices(q[i], query_tile + swizzled<D>(row, 2 * step + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < KEY_TILES; j += 2) {
            uint32_t k[4];
            const int row = 8 * j + lane / 16 * 8 + lane % 8;
            load_matrices(k, key_tile + swizzled<D>(row, 2 * step + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                mma<T>(scores[i][j], q[i][0], q[i][1], q[i][2], q[i][3], k[0], k[1]);
                mma<T>(scores[i][j + 1], q[i][0], q[i][1], q[i][2], q[i][3], k[2], k[3]);
            }
        }
    }
}

// Drops the keys after each row's position: `last_key[i][half]` is the row's own, counted from
// the tile's first key.
__device__ __forceinline__ void mask(float (&scores)[ROW_TILES][KEY_TILES][4],
                                     const int (&last_key)[ROW_TILES][2]) {
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
        for (int j = 0; j < KEY_TILES; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (8 * j + 2 * pair + k % 2 > last_key[i][k / 2]) {
                    scores[i][j][k] = -INFINITY;
                }
            }
        }
    }
}

// Turns scores into weights and rescales the sums so far.
template <int D>
__device__ __forceinline__ void soften(float (&scores)[ROW_TILES][KEY_TILES][4], State<D> &state,
                                       float scale_log2) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float max = state.max[i][half];
#pragma unroll
            for (int j = 0; j < KEY_TILES; j++) {
                max = fmaxf(max, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
            }
            max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, 1));
            max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, 2));
            const float rescale = exp2_fast((state.max[i][half] - max) * scale_log2);
            state.max[i][half] = max;
            const float offset = max * scale_log2;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < KEY_TILES; j++) {
#pragma unroll
                for (int k = 2 * half; k < 2 * half + 2; k++) {
                    scores[i][j][k] = exp2_fast(fmaf(scores[i][j][k], scale_log2, -offset));
                    sum += scores[i][j][k];
                }
            }
            // Each thread sums its own keys; the lanes are added up once, at the end.
            state.sum[i][half] = state.sum[i][half] * rescale + sum;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                state.out[i][j][2 * half] *= rescale;
                state.out[i][j][2 * half + 1] *= rescale;
            }
        }
    }
}

template <typename T, int D>
__device__ __forceinline__ void add_values(State<D> &state,
                                           const float (&p)[ROW_TILES][KEY_TILES][4],
                                           uint32_t value_tile) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        uint32_t weights[ROW_TILES][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            const float(&low)[4] = p[i][2 * step];
            const float(&high)[4] = p[i][2 * step + 1];
            weights[i][0] = pack<T>(low[0], low[1]);
            weights[i][1] = pack<T>(low[2], low[3]);
            weights[i][2] = pack<T>(high[0], high[1]);
            weights[i][3] = pack<T>(high[2], high[3]);
        }
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            uint32_t v[4];
            const int row = 16 * step + lane % 16;
            load_matrices_transposed(v, value_tile + swizzled<D>(row, j + lane / 16));
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                mma<T>(state.out[i][j], weights[i][0], weights[i][1], weights[i][2],
                       weights[i][3], v[0], v[1]);
                mma<T>(state.out[i][j + 1], weights[i][0], weights[i][1], weights[i][2],
                       weights[i][3], v[2], v[3]);
            }
        }
    }
}

// Writes the warp's rows: through its own rows of the query tile, so that stores are 16 bytes.
template <typename T, int D>
__device__ __forceinline__ void write_rows(T *out, char *query_tile, State<D> &state,
                                           const Work &work, int group_size, int row_stride) {
    constexpr int COLUMNS = D / 8;
    const int lane = threadIdx.x % WARP_SIZE;
    const int first_row = threadIdx.x / WARP_SIZE * ROW_TILES * 16;
    // All lanes have read the queries.
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = state.sum[i][half];
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            sum += __shfl_xor_sync(FULL_MASK, sum, 2);
            const float scale = 1.0f / sum;
            const int row = first_row + 16 * i + 8 * half + lane / 4;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                *reinterpret_cast<uint32_t *>(query_tile + swizzled<D>(row, j) + 4 * (lane % 4)) =
                    pack<T>(state.out[i][j][2 * half] * scale,
                            state.out[i][j][2 * half + 1] * scale);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < ROW_TILES * 16 * COLUMNS; i += WARP_SIZE) {
        const int row = first_row + i / COLUMNS;
        const int packed = work.tile * ROWS + row;
        const int token = packed / group_size;
        if (token < work.query_len) {
            store16(out + (int64_t)token * row_stride + packed % group_size * D + i % COLUMNS * 8,
                    load16(query_tile + swizzled<D>(row, i % COLUMNS)));
        }
    }
}

template <typename T, typename E, int D>
__device__ __forceinline__ void
attention_prefill(T *out, const T *q, const E *k_cache, const E *v_cache, const int *cu_seqlens_q,
                  const int *context_lens, const int *block_tables, const int *cu_blocks,
                  float scale_log2, int num_sequences, int min_query_len, int num_heads,
                  int num_kv_heads, int block_shift) {
    extern __shared__ __align__(128) char tiles[];
    constexpr int TILE_BYTES = KEYS * D * 2;
    constexpr int STAGES = IS_E4M3<E> ? 1 : 2;
    const uint32_t query_tile = shared_address(tiles);
    const uint32_t key_tiles = query_tile + ROWS * D * 2;
    const uint32_t value_tiles = key_tiles + STAGES * TILE_BYTES;
    // Of E4M3, codes come behind the tiles.
    constexpr int CODES_AT = ROWS * D * 2 + 2 * TILE_BYTES;
    const int group_size = num_heads / num_kv_heads;
    const int kv_head = blockIdx.x;
    wait_for_producer();
    release_consumer();
    // Every warp looks for itself: cheaper than a barrier.
    const Work work = find_work(blockIdx.y, cu_seqlens_q, num_sequences, max(min_query_len, 1),
                                group_size);
    if (work.sequence < 0) {
        return;
    }
    const int context_len = context_lens[work.sequence];
    const int first_position = context_len - work.query_len;
    const int first_token = work.tile * ROWS / group_size;
    const int last_token = min((work.tile * ROWS + ROWS - 1) / group_size, work.query_len - 1);
    const Cache<E> cache = {k_cache,
                            v_cache,
                            block_tables + cu_blocks[work.sequence],
                            first_position + last_token + 1,
                            kv_head,
                            num_kv_heads,
                            block_shift};

    const int row_stride = num_heads * D;
    const int64_t origin = (int64_t)work.query_start * row_stride + kv_head * group_size * D;
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        const int row = i / (D / 8);
        const int column = i % (D / 8);
        const int packed = work.tile * ROWS + row;
        const int token = packed / group_size;
        const bool is_there = token < work.query_len;
        const int64_t offset =
            is_there ? (int64_t)token * row_stride + packed % group_size * D + 8 * column : 0;
        copy16_async(query_tile + swizzled<D>(row, column), q + origin + offset, is_there);
    }
    if constexpr (IS_E4M3<E>) {
        copy_codes<D>(query_tile + CODES_AT, cache, 0);
    } else {
        copy_keys<T, D>(key_tiles, value_tiles, cache, 0);
    }
    commit_copies();

    State<D> state;
    int position[ROW_TILES][2];
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = (threadIdx.x / WARP_SIZE * ROW_TILES + i) * 16 + 8 * half + lane / 4;
            // Rows beyond the last token are computed as it is, and not written.
            const int token = min((work.tile * ROWS + row) / group_size, last_token);
            position[i][half] = first_position + token;
            state.max[i][half] = -INFINITY;
            state.sum[i][half] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                state.out[i][j][k] = 0.0f;
            }
        }
    }
    int stage = 0;
    for (int first = 0; first < cache.num_keys; first += KEYS) {
        wait_for_copies<0>();
        // Also: all warps are done with the other stage, of E4M3 with the tiles.
        __syncthreads();
        if constexpr (IS_E4M3<E>) {
            widen_codes<T, D>(tiles + ROWS * D * 2, tiles + CODES_AT);
            __syncthreads();
        }
        if (first + KEYS < cache.num_keys) {
            if constexpr (IS_E4M3<E>) {
                copy_codes<D>(query_tile + CODES_AT, cache, first + KEYS);
            } else {
                copy_keys<T, D>(key_tiles + (1 - stage) * TILE_BYTES,
                                value_tiles + (1 - stage) * TILE_BYTES, cache, first + KEYS);
            }
            commit_copies();
        }
        float scores[ROW_TILES][KEY_TILES][4];
        score<T, D>(scores, query_tile, key_tiles + stage * TILE_BYTES);
        if (first + KEYS > first_position + first_token + 1) {
            int last_key[ROW_TILES][2];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                last_key[i][0] = position[i][0] - first;
                last_key[i][1] = position[i][1] - first;
            }
            mask(scores, last_key);
        }
        soften<D>(scores, state, scale_log2);
        add_values<T, D>(state, scores, value_tiles + stage * TILE_BYTES);
        stage = STAGES - 1 - stage;
    }
    write_rows<T, D>(out + origin, tiles, state, work, group_size, row_stride);
}

#define ENTRY(T, E, SUFFIX, D)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_prefill_##SUFFIX##_##D(     \
        T *out, const T *q, const E *k_cache, const E *v_cache, const int *cu_seqlens_q,           \
        const int *context_lens, const int *block_tables, const int *cu_blocks, float scale_log2,  \
        int num_sequences, int min_query_len, int num_heads, int num_kv_heads, int block_shift) {  \
        attention_prefill<T, E, D>(out, q, k_cache, v_cache, cu_seqlens_q, context_lens,           \
                                   block_tables, cu_blocks, scale_log2, num_sequences,             \
                                   min_query_len, num_heads, num_kv_heads, block_shift);           \
    }
#define ENTRIES(T, SUFFIX, D)                                                                      \
    ENTRY(T, T, SUFFIX, D)                                                                         \
    ENTRY(T, E4m3, fp8_##SUFFIX, D)

ENTRIES(__half, f16, 64)
ENTRIES(__half, f16, 128)
ENTRIES(__nv_bfloat16, bf16, 64)
ENTRIES(__nv_bfloat16, bf16, 128)
