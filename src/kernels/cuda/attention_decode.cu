// attention_decode: one query token a sequence against its paged keys and values;
// rope_attention_decode: the same from the output of the QKV product, with the step's keys and
// values written to the cache: rope_and_cache and attention_decode in one.
//
// Shapes:  q, out [tokens, num_heads, D]; k_cache, v_cache
//          [num_blocks][num_kv_heads][2^block_shift][D], block_shift ≥ 4; all of type T, or with
//          fp8 in the name the caches of E4M3, whose products are those of T.
//          cu_seqlens_q i32 [sequences + 1], context_lens i32 [sequences] (this step's token
//          included), block_tables i32 ragged, cu_blocks i32 [sequences + 1]: as AttentionBatch.
//          split_tokens i32 [1]: tokens that one block takes, a multiple of 16; the host writes it
//          each step so that the blocks are even and fill the GPU.
//          Sequences of another number of query tokens than one are left alone: prefill's, or a
//          bucket's padding (0).
//          rope_attention_decode: in place of q, the parameters of rope_and_cache.cu without bias;
//          every sequence of one token is written, others are left alone.
// Scratch: partial f32 [sequences][num_kv_heads][splits][group (D + 4)], group = num_heads /
//          num_kv_heads; counters u32 [sequences][num_kv_heads], zero before the first launch,
//          left zero by each.
// Names:   {,rope_}attention_decode_{f16,bf16}_{64,128}_g{8,16}, {,rope_}attention_decode_fp8_{…}:
//          groups of at most 8 or 16 heads.
// Launch:  grid (splits, num_kv_heads, sequences), block 128. A context longer than splits ·
//          split_tokens is still computed right: the last split takes the rest. splits ≤ 128.
// Scale:   scale_log2 = scale · log2(e).
// Method:  own; split KV as "Flash-Decoding" (2023). A block's four warps take tiles of 16 tokens
//          in turn, each with its own running softmax and its own queue of tiles in shared memory
//          (cp.async, no barrier of the block). Keys are the left operand of Sᵀ = K Qᵀ and values
//          that of Oᵀ = Vᵀ Pᵀ, so that the query heads of a group fill the 8 columns of a product.
//          Warps meet in shared memory, splits in `partial`: the last block to arrive adds them
//          up. Only the queries and the tile with the newest token wait for wait_for_producer():
//          other tiles were written by earlier steps, which have ended when this kernel starts:
//          of any two kernels between them one lets its successor start only after its own wait.
//          So no sequence may share a block that another one fills in the same step; and
//          attention_decode must have rope_and_cache (or a kernel after it) as its direct
//          predecessor, rope_attention_decode the QKV product. In the latter each block turns
//          its group's queries itself, and that of the last split writes key and value.
// FP8:     E4M3 stays E4M3 up to the registers. A matrix of 16-byte rows as ldmatrix loads it has
//          16 dimensions; a thread gets four neighbours of one token (keys) or two neighbours of
//          two tokens (values), not the places that the product's fragments have. So the products
//          see the dimensions of each 16 in another order: of the scores, in which they are summed,
//          queries are loaded alike; of the outputs, sums are shared accordingly.
// Shared:  dynamic shared memory, 512 · D bytes (the opt-in for D 128): two stages of four warps'
//          tiles of keys and values, of E4M3 four stages.
#include "project.cuh"

constexpr int WARPS = 4;
constexpr int TILE = 16;
constexpr int MAX_SPLITS = 128;
// As many bytes are under way whatever the elements E of the cache are.
template <typename E> constexpr int STAGES = 4 / sizeof(E);

// Returns the byte offset of 16-byte column `column` of token `row` in a tile, swizzled: a column of
// eight tokens lies in all banks.
template <typename E, int D> __device__ __forceinline__ uint32_t place_of(int row, int column) {
    constexpr int ROW_BYTES = D * sizeof(E);
    const int turn = ROW_BYTES >= 128 ? row & 7 : row >> 1 & 3;
    return row * ROW_BYTES + ((column ^ turn) << 4);
}

// Loads 16 dimensions of a tile's keys as the left operand of a product: of tokens group and
// group + 8, the pairs 2 pair and 2 pair + 8; of E4M3 the pairs 4 pair and 4 pair + 2. `raw` keeps
// what one load of E4M3 brings for an even step and the next.
template <typename T, typename E, int D>
__device__ __forceinline__ void load_keys(uint32_t (&k)[4], uint32_t (&raw)[4], uint32_t keys,
                                          int step) {
    const int lane = threadIdx.x % WARP_SIZE;
    if constexpr (!IS_E4M3<E>) {
        load_matrices(k, keys + place_of<E, D>(lane % 16, 2 * step + lane / 16));
    } else {
        if (step % 2 == 0) {
            load_matrices(raw, keys + place_of<E, D>(lane % 16, step + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            k[i] = from_e4m3<T>(raw[step % 2 * 2 + i]);
            k[i + 2] = from_e4m3<T>(raw[step % 2 * 2 + i] >> 16);
        }
    }
}

// Loads 16 dimensions of a tile's values, transposed, as a left operand: of dimensions group and
// group + 8 (of E4M3 2 group and 2 group + 1), tokens 2 pair and 2 pair + 8 with their neighbours.
template <typename T, typename E, int D>
__device__ __forceinline__ void load_values(uint32_t (&v)[4], uint32_t (&raw)[4], uint32_t values,
                                            int step) {
    const int lane = threadIdx.x % WARP_SIZE;
    if constexpr (!IS_E4M3<E>) {
        // Lanes 8 to 15 give dimensions 8 to 15 and lanes 16 to 31 tokens 8 to 15.
        const int token = lane / 16 * 8 + lane % 8;
        load_matrices_transposed(v, values + place_of<E, D>(token, 2 * step + lane / 8 % 2));
    } else {
        if (step % 2 == 0) {
            load_matrices_transposed(raw, values + place_of<E, D>(lane % 16, step + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            // Two dimensions of a token, then of the next: first the even one of both.
            const uint32_t sorted = __byte_perm(raw[step % 2 * 2 + i], 0, 0x3120);
            v[2 * i] = from_e4m3<T>(sorted);
            v[2 * i + 1] = from_e4m3<T>(sorted >> 16);
        }
    }
}

// Returns which of 16 dimensions a thread of `group` has: the first for `half` 0, then the second.
template <typename E> __device__ __forceinline__ int dim_of(int group, int half) {
    return IS_E4M3<E> ? 2 * group + half : group + 8 * half;
}

// Running softmax of one warp. A thread has heads 2 pair and 2 pair + 1 of each 8, and of each 16
// dimensions those that dim_of says.
template <int D, int HEAD_TILES> struct State {
    float max[HEAD_TILES][2];
    float sum[HEAD_TILES][2];
    float out[HEAD_TILES][D / 16][4];
};

template <typename T, typename E, int D, int HEAD_TILES>
__device__ __forceinline__ void score(float (&scores)[HEAD_TILES][4], uint32_t keys,
                                      const uint2 (&query)[HEAD_TILES][D / 16]) {
    // Two sums a tile: a chain of products waits for each one's result.
    float odd[HEAD_TILES][4] = {};
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[tile][i] = 0.0f;
        }
    }
    uint32_t raw[4];
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t k[4];
        load_keys<T, E, D>(k, raw, keys, step);
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; tile++) {
            mma<T>(step % 2 == 0 ? scores[tile] : odd[tile], k[0], k[1], k[2], k[3],
                   query[tile][step].x, query[tile][step].y);
        }
    }
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[tile][i] += odd[tile][i];
        }
    }
}

// Turns scores into weights, packed as the right operand of Oᵀ = Vᵀ Pᵀ, and rescales the state.
template <typename T, int D, int HEAD_TILES>
__device__ __forceinline__ void soften(State<D, HEAD_TILES> &state,
                                       uint32_t (&weights)[HEAD_TILES][2],
                                       float (&scores)[HEAD_TILES][4], float scale_log2,
                                       bool has_low, bool has_high) {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; tile++) {
        float p[4];
#pragma unroll
        for (int head = 0; head < 2; head++) {
            const float low = has_low ? scores[tile][head] * scale_log2 : -INFINITY;
            const float high = has_high ? scores[tile][head + 2] * scale_log2 : -INFINITY;
            float max = fmaxf(low, high);
            max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, 4));
            max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, 8));
            max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, 16));
            max = fmaxf(max, state.max[tile][head]);
            const float rescale = exp2_fast(state.max[tile][head] - max);
            state.max[tile][head] = max;
            p[head] = exp2_fast(low - max);
            p[head + 2] = exp2_fast(high - max);
            // Each thread sums its own tokens; the lanes are added up once, at the end.
            state.sum[tile][head] = state.sum[tile][head] * rescale + p[head] + p[head + 2];
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                state.out[tile][i][head] *= rescale;
                state.out[tile][i][head + 2] *= rescale;
            }
        }
        weights[tile][0] = transpose8x8(pack<T>(p[0], p[1]));
        weights[tile][1] = transpose8x8(pack<T>(p[2], p[3]));
    }
}

template <typename T, typename E, int D, int HEAD_TILES>
__device__ __forceinline__ void add_values(State<D, HEAD_TILES> &state, uint32_t values,
                                           const uint32_t (&weights)[HEAD_TILES][2]) {
    uint32_t raw[4];
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t v[4];
        load_values<T, E, D>(v, raw, values, step);
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; tile++) {
            mma<T>(state.out[tile][step], v[0], v[1], v[2], v[3], weights[tile][0],
                   weights[tile][1]);
        }
    }
}

// Where a warp's tiles come from and go to.
template <typename E, int D> struct Tiles {
    const E *k_cache;
    const E *v_cache;
    const int *block_table;
    int end;
    int kv_head;
    int num_kv_heads;
    int block_shift;
    uint32_t queue;

    static constexpr int TILE_BYTES = TILE * D * sizeof(E);
    static constexpr int STAGE_BYTES = 2 * TILE_BYTES;

    // Starts the copies of the tile from token `first` on, if there is one.
    __device__ __forceinline__ void copy(int stage, int first, int block) const {
        if (first < end) {
            constexpr int VECTOR = 16 / sizeof(E);
            constexpr int COLUMNS = D / VECTOR;
            constexpr int ROWS = WARP_SIZE / COLUMNS;
            const int lane = threadIdx.x % WARP_SIZE;
            const int column = lane % COLUMNS;
            const int64_t head = (int64_t)block * num_kv_heads + kv_head;
            const int64_t slot = (head << block_shift) + (first & ((1 << block_shift) - 1));
            const uint32_t target = queue + stage * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < TILE / ROWS; i++) {
                const int row = i * ROWS + lane / COLUMNS;
                const int64_t offset = (slot + row) * D + VECTOR * column;
                const bool is_there = first + row < end;
                const uint32_t place = target + place_of<E, D>(row, column);
                copy16_async(place, k_cache + offset, is_there);
                copy16_async(place + TILE_BYTES, v_cache + offset, is_there);
            }
        }
        commit_copies();
    }
};

// Cache blocks of a warp's tiles: lane i knows that of the i-th tile from `first` on.
struct BlockIds {
    int first;
    int ids;

    __device__ __forceinline__ void load(const int *block_table, int token, int end, int shift) {
        const int other = token + threadIdx.x % WARP_SIZE * WARPS * TILE;
        first = token;
        ids = other < end ? block_table[other >> shift] : 0;
    }
    // Returns the block of the tile at `token`; all lanes call it, with tokens in order.
    __device__ __forceinline__ int get(const int *block_table, int token, int end, int shift) {
        if (token - first == WARP_SIZE * WARPS * TILE) {
            load(block_table, token, end, shift);
        }
        return __shfl_sync(FULL_MASK, ids, (token - first) / (WARPS * TILE));
    }
};

// What a block shares: each warp's sums, then the weights of splits.
template <int D, int HEADS> struct Shared {
    float out[WARPS][HEADS][D];
    float max[WARPS][HEADS];
    float sum[WARPS][HEADS];
    bool is_last;
};

template <typename E, int D, int HEAD_TILES>
__device__ __forceinline__ void share(Shared<D, 8 * HEAD_TILES> &shared,
                                      State<D, HEAD_TILES> &state) {
    const int warp = threadIdx.x / WARP_SIZE;
    const int group = threadIdx.x % WARP_SIZE / 4;
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = 8 * tile + 2 * pair + i;
            float sum = state.sum[tile][i];
            sum += __shfl_xor_sync(FULL_MASK, sum, 4);
            sum += __shfl_xor_sync(FULL_MASK, sum, 8);
            sum += __shfl_xor_sync(FULL_MASK, sum, 16);
            if (group == 0) {
                shared.max[warp][head] = state.max[tile][i];
                shared.sum[warp][head] = sum;
            }
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                const int dim = 16 * j;
                shared.out[warp][head][dim + dim_of<E>(group, 0)] = state.out[tile][j][i];
                shared.out[warp][head][dim + dim_of<E>(group, 1)] = state.out[tile][j][i + 2];
            }
        }
    }
    __syncthreads();
}

// Adds up the splits' sums and writes the heads' outputs. A warp weighs the splits of a head, a
// lane has every 32nd split.
template <typename T, int D, int HEADS>
__device__ __forceinline__ void combine(Shared<D, HEADS> &shared, T *out, const float *partial,
                                        int num_splits, int group_size) {
    constexpr int PER_LANE = MAX_SPLITS / WARP_SIZE;
    float *weights = &shared.out[0][0][0];
    static_assert(MAX_SPLITS * HEADS <= WARPS * HEADS * D, "weights of splits fit");
    const int stride = group_size * (D + 4);
    const int lane = threadIdx.x % WARP_SIZE;
    for (int head = threadIdx.x / WARP_SIZE; head < group_size; head += WARPS) {
        const float *stats = partial + group_size * D + 2 * head;
        float2 own[PER_LANE];
        float max = -INFINITY;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int split = lane + i * WARP_SIZE;
            own[i] = split < num_splits
                         ? __ldcg(reinterpret_cast<const float2 *>(stats + split * stride))
                         : make_float2(-INFINITY, 0.0f);
            max = fmaxf(max, own[i].x);
        }
#pragma unroll
        for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
            max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, offset));
        }
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            own[i].x = exp2_fast(own[i].x - max);
            sum += own[i].x * own[i].y;
        }
        const float scale = 1.0f / warp_sum(sum);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int split = lane + i * WARP_SIZE;
            if (split < num_splits) {
                weights[split * HEADS + head] = own[i].x * scale;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group_size * D / 4; i += blockDim.x) {
        const int head = 4 * i / D;
        const float4 *values = reinterpret_cast<const float4 *>(partial) + i;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int split = 0; split < num_splits; split++) {
            const float weight = weights[split * HEADS + head];
            const float4 value = __ldcg(values + split * (stride / 4));
            total.x += weight * value.x;
            total.y += weight * value.y;
            total.z += weight * value.z;
            total.w += weight * value.w;
        }
        *reinterpret_cast<uint2 *>(out + 4 * i) =
            make_uint2(pack<T>(total.x, total.y), pack<T>(total.z, total.w));
    }
}

// Adds up the warps' sums; writes the outputs, or this split's share of them.
template <typename T, int D, int HEADS>
__device__ __forceinline__ void finish(Shared<D, HEADS> &shared, T *out, float *partial,
                                       bool is_whole, int group_size) {
    for (int i = threadIdx.x; i < group_size * D; i += blockDim.x) {
        const int head = i / D;
        float max = -INFINITY;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            max = fmaxf(max, shared.max[warp][head]);
        }
        float sum = 0.0f;
        float value = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            const float weight = exp2_fast(shared.max[warp][head] - max);
            sum += weight * shared.sum[warp][head];
            value += weight * shared.out[warp][head][i % D];
        }
        if (is_whole) {
            out[i] = from_float<T>(value / sum);
            continue;
        }
        partial[i] = value;
        if (i % D == 0) {
            partial[group_size * D + 2 * head] = max;
            partial[group_size * D + 2 * head + 1] = sum;
        }
    }
}

template <typename T, typename E, int D, int HEAD_TILES, bool IS_PROJECTED>
__device__ __forceinline__ void
attention_decode(T *out, const T *q, const Projected<T> &from, E *k_cache, E *v_cache,
                 const int *cu_seqlens_q, const int *context_lens, const int *block_tables,
                 const int *cu_blocks, const int *split_tokens, float *partial,
                 uint32_t *counters, float scale_log2, int num_heads, int num_kv_heads,
                 int block_shift) {
    constexpr int HEADS = 8 * HEAD_TILES;
    __shared__ __align__(16) Queries<T, D, IS_PROJECTED ? HEADS : 1> queries;
    extern __shared__ __align__(128) char queues[];
    Shared<D, HEADS> &shared = *reinterpret_cast<Shared<D, HEADS> *>(queues);
    constexpr int QUEUE_BYTES = STAGES<E> * Tiles<E, D>::STAGE_BYTES;
    static_assert(sizeof(Shared<D, HEADS>) <= WARPS * QUEUE_BYTES, "fits");
    const int split = blockIdx.x;
    const int kv_head = blockIdx.y;
    const int sequence = blockIdx.z;
    // All at once: each would wait for memory in turn otherwise.
    const int token = cu_seqlens_q[sequence];
    const int next_token = cu_seqlens_q[sequence + 1];
    const int context_len = context_lens[sequence];
    const int split_len = *split_tokens;
    const int first_block = cu_blocks[sequence];
    const int num_splits = min((context_len + split_len - 1) / split_len, (int)gridDim.x);
    if (next_token - token != 1 || split >= num_splits) {
        // A kernel that ended without having waited would let the next one overtake the last.
        wait_for_producer();
        return;
    }
    const int start = split * split_len;
    const int end = split == num_splits - 1 ? context_len : start + split_len;
    const int group_size = num_heads / num_kv_heads;
    const int64_t first_element = ((int64_t)token * num_heads + kv_head * group_size) * D;
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;

    const Tiles<E, D> tiles = {k_cache,      v_cache,     block_tables + first_block, end, kv_head,
                               num_kv_heads, block_shift,
                               shared_address(queues) + warp * QUEUE_BYTES};
    int tile = start + warp * TILE;
    BlockIds blocks;
    blocks.load(tiles.block_table, tile, end, block_shift);
    int next = tile;
    // The newest token is this step's own: its tile has to wait.
    const int num_old = context_len - 1;
    int num_copied = 0;
#pragma unroll
    for (int stage = 0; stage < STAGES<E> - 1; stage++) {
        if (next + TILE <= num_old) {
            tiles.copy(stage, next, blocks.get(tiles.block_table, next, end, block_shift));
            next += WARPS * TILE;
            num_copied++;
        }
    }
    Angles<D> angles;
    if constexpr (IS_PROJECTED) {
        load_angles(angles, from.cos, from.sin, from.positions[token]);
    }
    release_consumer();
    wait_for_producer();
    if constexpr (IS_PROJECTED) {
        project<T, E, D, HEADS, WARPS>(queries, from, angles, k_cache, v_cache, token, kv_head,
                                       num_heads, num_kv_heads, block_shift,
                                       split == num_splits - 1);
    }
#pragma unroll
    for (int stage = 0; stage < STAGES<E> - 1; stage++) {
        if (stage >= num_copied) {
            tiles.copy(stage, next, blocks.get(tiles.block_table, next, end, block_shift));
            next += WARPS * TILE;
        }
    }
    uint2 query[HEAD_TILES][D / 16];
    State<D, HEAD_TILES> state;
#pragma unroll
    for (int i = 0; i < HEAD_TILES; i++) {
        const int head = 8 * i + lane / 4;
        // In the order of the keys.
        constexpr int LANE_DIMS = IS_E4M3<E> ? 4 : 2;
        constexpr int SECOND = IS_E4M3<E> ? 2 : 8;
        const T *source;
        if constexpr (IS_PROJECTED) {
            source = queries[head] + LANE_DIMS * (lane % 4);
        } else {
            source = q + first_element + head * D + LANE_DIMS * (lane % 4);
        }
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            const bool is_there = head < group_size;
            query[i][step].x =
                is_there ? *reinterpret_cast<const uint32_t *>(source + 16 * step) : 0;
            query[i][step].y =
                is_there ? *reinterpret_cast<const uint32_t *>(source + 16 * step + SECOND) : 0;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            state.max[i][j] = -INFINITY;
            state.sum[i][j] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                state.out[i][j][k] = 0.0f;
            }
        }
    }
    int read = 0;
    int write = STAGES<E> - 1;
    for (; tile < end; tile += WARPS * TILE) {
        wait_for_copies<STAGES<E> - 2>();
        // All lanes' copies have arrived, and all are done with the stage before.
        __syncwarp();
        tiles.copy(write, next, blocks.get(tiles.block_table, next, end, block_shift));
        next += WARPS * TILE;
        const uint32_t keys = tiles.queue + read * Tiles<E, D>::STAGE_BYTES;
        float scores[HEAD_TILES][4];
        uint32_t weights[HEAD_TILES][2];
        score<T, E, D, HEAD_TILES>(scores, keys, query);
        soften<T, D, HEAD_TILES>(state, weights, scores, scale_log2, tile + lane / 4 < end,
                                 tile + lane / 4 + 8 < end);
        add_values<T, E, D, HEAD_TILES>(state, keys + Tiles<E, D>::TILE_BYTES, weights);
        write = read;
        read = read == STAGES<E> - 1 ? 0 : read + 1;
    }
    wait_for_copies<0>();
    // The sums take the place of the queues.
    __syncthreads();
    share<E, D, HEAD_TILES>(shared, state);
    const int64_t pair = (int64_t)sequence * num_kv_heads + kv_head;
    const int stride = group_size * (D + 4);
    float *splits = partial + pair * gridDim.x * stride;
    finish<T, D, HEADS>(shared, out + first_element, splits + split * stride, num_splits == 1,
                        group_size);
    if (num_splits == 1) {
        return;
    }
    // The writes of all threads must be visible before the count is: barrier, then fence.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.is_last = atomicAdd(counters + pair, 1) == (uint32_t)num_splits - 1;
    }
    __syncthreads();
    if (!shared.is_last) {
        return;
    }
    __threadfence();
    combine<T, D, HEADS>(shared, out + first_element, splits, num_splits, group_size);
    if (threadIdx.x == 0) {
        counters[pair] = 0;
    }
}

#define ENTRY(T, E, SUFFIX, D, GROUP, BLOCKS)                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP_SIZE, BLOCKS)                         \
        attention_decode_##SUFFIX##_##D##_g##GROUP(                                                \
            T *out, const T *q, E *k_cache, E *v_cache, const int *cu_seqlens_q,                   \
            const int *context_lens, const int *block_tables, const int *cu_blocks,                \
            const int *split_tokens, float *partial, uint32_t *counters, float scale_log2,         \
            int num_heads, int num_kv_heads, int block_shift) {                                    \
        attention_decode<T, E, D, GROUP / 8, false>(                                               \
            out, q, Projected<T>{}, k_cache, v_cache, cu_seqlens_q, context_lens, block_tables,    \
            cu_blocks, split_tokens, partial, counters, scale_log2, num_heads, num_kv_heads,       \
            block_shift);                                                                          \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP_SIZE, BLOCKS)                         \
        rope_attention_decode_##SUFFIX##_##D##_g##GROUP(                                           \
            T *out, const T *qkv, const T *q_norm, const T *k_norm, const float *cos,              \
            const float *sin, const int *positions, const int *slot_mapping, float eps,            \
            E *k_cache, E *v_cache, const int *cu_seqlens_q, const int *context_lens,              \
            const int *block_tables, const int *cu_blocks, const int *split_tokens,                \
            float *partial, uint32_t *counters, float scale_log2, int num_heads,                   \
            int num_kv_heads, int block_shift) {                                                   \
        const Projected<T> from = {qkv, q_norm, k_norm, cos, sin, positions, slot_mapping, eps};   \
        attention_decode<T, E, D, GROUP / 8, true>(                                                \
            out, nullptr, from, k_cache, v_cache, cu_seqlens_q, context_lens, block_tables,        \
            cu_blocks, split_tokens, partial, counters, scale_log2, num_heads, num_kv_heads,       \
            block_shift);                                                                          \
    }
#define ENTRIES(T, E, SUFFIX)                                                                      \
    ENTRY(T, E, SUFFIX, 64, 8, 4)                                                                  \
    ENTRY(T, E, SUFFIX, 64, 16, 3)                                                                 \
    ENTRY(T, E, SUFFIX, 128, 8, 3)                                                                 \
    ENTRY(T, E, SUFFIX, 128, 16, 2)

ENTRIES(__half, __half, f16)
ENTRIES(__half, E4m3, fp8_f16)
ENTRIES(__nv_bfloat16, __nv_bfloat16, bf16)
ENTRIES(__nv_bfloat16, E4m3, fp8_bf16)
