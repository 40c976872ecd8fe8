// attention_decode: one query token a sequence against its paged keys and values.
//
// Shapes:  q, out [tokens, num_heads, D]; k_cache, v_cache
//          [num_blocks][num_kv_heads][2^block_shift][D], block_shift ≥ 4; all of type T.
//          cu_seqlens_q i32 [sequences + 1], context_lens i32 [sequences] (this step's token
//          included), block_tables i32 ragged, cu_blocks i32 [sequences + 1]: as AttentionBatch.
//          split_tokens i32 [1]: tokens that one block takes, a multiple of 16; the host writes it
//          each step so that the blocks are even and fill the GPU.
//          Sequences of another number of query tokens than one are left alone: prefill's, or a
//          bucket's padding (0).
// Scratch: partial f32 [sequences][num_kv_heads][splits][group (D + 4)], group = num_heads /
//          num_kv_heads; counters u32 [sequences][num_kv_heads], zero before the first launch,
//          left zero by each.
// Names:   attention_decode_{f16,bf16}_{64,128}_g{8,16}: groups of at most 8 or 16 heads.
// Launch:  grid (splits, num_kv_heads, sequences), block 128. A context longer than splits ·
//          split_tokens is still computed right: the last split takes the rest. splits ≤ 128.
// Scale:   scale_log2 = scale · log2(e).
// Method:  own; split KV as "Flash-Decoding" (2023). A block's four warps take tiles of 16 tokens
//          in turn, each with its own running softmax. Keys are the left operand of Sᵀ = K Qᵀ and
//          values that of Oᵀ = Vᵀ Pᵀ, so that the query heads of a group fill the 8 columns of a
//          product and both stay in registers: keys as loaded (see gemm_small.cu), values and P
//          through movmatrix. The next tile is loaded while this one is worked on. Warps meet in
//          shared memory, splits in `partial`: the last block to arrive adds them up.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int TILE = 16;
constexpr int MAX_SPLITS = 128;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A thread's share of a tile: tokens group and group + 8, of each 32 dimensions 8 from 8 pair.
template <int D> struct Tile {
    uint4 low[D / 32];
    uint4 high[D / 32];
};

template <typename T, int D>
__device__ __forceinline__ void load_tile(Tile<D> &tile, const T *rows, bool has_low,
                                          bool has_high) {
    const uint4 zeros = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int chunk = 0; chunk < D / 32; chunk++) {
        tile.low[chunk] = has_low ? load16_once(rows + 32 * chunk) : zeros;
        tile.high[chunk] = has_high ? load16_once(rows + 8 * D + 32 * chunk) : zeros;
    }
}

// Running softmax of one warp. A thread has heads 2 pair and 2 pair + 1 of each 8, and of each 16
// dimensions the rows group and group + 8 of a product (see dimension_of).
template <int D, int HEAD_TILES> struct State {
    float max[HEAD_TILES][2];
    float sum[HEAD_TILES][2];
    float out[HEAD_TILES][D / 16][4];
};

// Returns the dimension that row `group` (+ 8 if `half`) of product `tile` of Vᵀ stands for.
__device__ __forceinline__ int dimension_of(int tile, int half, int group) {
    return 32 * (tile / 2) + 8 * (group / 2) + 4 * (tile % 2) + 2 * half + group % 2;
}

template <typename T, int D, int HEAD_TILES>
__device__ __forceinline__ void score(float (&scores)[HEAD_TILES][4], const Tile<D> &keys,
                                      const uint4 (&query)[HEAD_TILES][D / 32]) {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[tile][i] = 0.0f;
        }
#pragma unroll
        for (int chunk = 0; chunk < D / 32; chunk++) {
            const uint4 low = keys.low[chunk];
            const uint4 high = keys.high[chunk];
            const uint4 q = query[tile][chunk];
            mma<T>(scores[tile], low.x, high.x, low.y, high.y, q.x, q.y);
            mma<T>(scores[tile], low.z, high.z, low.w, high.w, q.z, q.w);
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

template <typename T, int D, int HEAD_TILES>
__device__ __forceinline__ void add_values(State<D, HEAD_TILES> &state, const Tile<D> &values,
                                           const uint32_t (&weights)[HEAD_TILES][2]) {
#pragma unroll
    for (int chunk = 0; chunk < D / 32; chunk++) {
        const uint4 low = values.low[chunk];
        const uint4 high = values.high[chunk];
        const uint32_t first[4] = {transpose8x8(low.x), transpose8x8(low.y), transpose8x8(high.x),
                                   transpose8x8(high.y)};
        const uint32_t second[4] = {transpose8x8(low.z), transpose8x8(low.w),
                                    transpose8x8(high.z), transpose8x8(high.w)};
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; tile++) {
            mma<T>(state.out[tile][2 * chunk], first[0], first[1], first[2], first[3],
                   weights[tile][0], weights[tile][1]);
            mma<T>(state.out[tile][2 * chunk + 1], second[0], second[1], second[2], second[3],
                   weights[tile][0], weights[tile][1]);
        }
    }
}

// Attends to tokens start to end, one warp's tiles of them.
template <typename T, int D, int HEAD_TILES>
__device__ __forceinline__ void attend(State<D, HEAD_TILES> &state, const T *k_cache,
                                       const T *v_cache, const int *block_table,
                                       const uint4 (&query)[HEAD_TILES][D / 32], float scale_log2,
                                       int start, int end, int kv_head, int num_kv_heads,
                                       int block_shift) {
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int group = lane / 4;
    const int pair = lane % 4;
    int token = start + warp * TILE;
    // Lane i knows the cache block of this warp's i-th tile from `known` on.
    int known = token;
    const auto block_of_lane = [&](int first) {
        const int other = first + lane * WARPS * TILE;
        return other < end ? block_table[other >> block_shift] : 0;
    };
    int block_ids = block_of_lane(known);
    const auto offset_of = [&](int first) {
        if (first - known == WARP_SIZE * WARPS * TILE) {
            known = first;
            block_ids = block_of_lane(known);
        }
        const int64_t block = __shfl_sync(FULL_MASK, block_ids, (first - known) / (WARPS * TILE));
        const int row = (first & ((1 << block_shift) - 1)) + group;
        return (((block * num_kv_heads + kv_head) << block_shift) + row) * D + 8 * pair;
    };
    if (token >= end) {
        return;
    }
    bool has_low = token + group < end;
    bool has_high = token + group + 8 < end;
    int64_t offset = offset_of(token);
    Tile<D> keys, values;
    load_tile<T, D>(keys, k_cache + offset, has_low, has_high);
    load_tile<T, D>(values, v_cache + offset, has_low, has_high);
    for (; token < end; token += WARPS * TILE) {
        float scores[HEAD_TILES][4];
        uint32_t weights[HEAD_TILES][2];
        score<T, D, HEAD_TILES>(scores, keys, query);
        const int next = token + WARPS * TILE;
        const bool next_low = next + group < end;
        const bool next_high = next + group + 8 < end;
        if (next < end) {
            offset = offset_of(next);
            load_tile<T, D>(keys, k_cache + offset, next_low, next_high);
        }
        soften<T, D, HEAD_TILES>(state, weights, scores, scale_log2, has_low, has_high);
        add_values<T, D, HEAD_TILES>(state, values, weights);
        if (next < end) {
            load_tile<T, D>(values, v_cache + offset, next_low, next_high);
        }
        has_low = next_low;
        has_high = next_high;
    }
}

// What a block shares: each warp's sums, then the weights of splits.
template <int D, int HEADS> struct Shared {
    float out[WARPS][HEADS][D];
    float max[WARPS][HEADS];
    float sum[WARPS][HEADS];
    bool is_last;
};

template <int D, int HEAD_TILES>
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
                shared.out[warp][head][dimension_of(j, 0, group)] = state.out[tile][j][i];
                shared.out[warp][head][dimension_of(j, 1, group)] = state.out[tile][j][i + 2];
            }
        }
    }
    __syncthreads();
}

// Adds up the splits' sums and writes the heads' outputs.
template <typename T, int D, int HEADS>
__device__ __forceinline__ void combine(Shared<D, HEADS> &shared, T *out, const float *partial,
                                        int num_splits, int group_size) {
    float *weights = &shared.out[0][0][0];
    static_assert(MAX_SPLITS * HEADS <= WARPS * HEADS * D, "weights of splits fit");
    const int stride = group_size * (D + 4);
    for (int head = threadIdx.x; head < group_size; head += blockDim.x) {
        const float *stats = partial + group_size * D + 2 * head;
        float max = -INFINITY;
        for (int split = 0; split < num_splits; split++) {
            max = fmaxf(max, __ldcg(stats + split * stride));
        }
        float sum = 0.0f;
        for (int split = 0; split < num_splits; split++) {
            const float weight = exp2_fast(__ldcg(stats + split * stride) - max);
            sum += weight * __ldcg(stats + split * stride + 1);
            weights[split * HEADS + head] = weight;
        }
        shared.sum[0][head] = 1.0f / sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group_size * D / 4; i += blockDim.x) {
        const int head = 4 * i / D;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int split = 0; split < num_splits; split++) {
            const float weight = weights[split * HEADS + head];
            const float4 value =
                __ldcg(reinterpret_cast<const float4 *>(partial + split * stride) + i);
            total.x += weight * value.x;
            total.y += weight * value.y;
            total.z += weight * value.z;
            total.w += weight * value.w;
        }
        const float scale = shared.sum[0][head];
        *reinterpret_cast<uint2 *>(out + 4 * i) = make_uint2(
            pack<T>(total.x * scale, total.y * scale), pack<T>(total.z * scale, total.w * scale));
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

template <typename T, int D, int HEAD_TILES>
__device__ __forceinline__ void
attention_decode(T *out, const T *q, const T *k_cache, const T *v_cache, const int *cu_seqlens_q,
                 const int *context_lens, const int *block_tables, const int *cu_blocks,
                 const int *split_tokens, float *partial, uint32_t *counters, float scale_log2,
                 int num_heads, int num_kv_heads, int block_shift) {
    constexpr int HEADS = 8 * HEAD_TILES;
    __shared__ Shared<D, HEADS> shared;
    const int split = blockIdx.x;
    const int kv_head = blockIdx.y;
    const int sequence = blockIdx.z;
    wait_for_producer();
    release_consumer();
    const int token = cu_seqlens_q[sequence];
    if (cu_seqlens_q[sequence + 1] - token != 1) {
        return;
    }
    const int context_len = context_lens[sequence];
    const int split_len = *split_tokens;
    const int num_splits = min((context_len + split_len - 1) / split_len, (int)gridDim.x);
    if (split >= num_splits) {
        return;
    }
    const int start = split * split_len;
    const int end = split == num_splits - 1 ? context_len : start + split_len;
    const int group_size = num_heads / num_kv_heads;
    const int64_t first_element = ((int64_t)token * num_heads + kv_head * group_size) * D;

    const int lane = threadIdx.x % WARP_SIZE;
    uint4 query[HEAD_TILES][D / 32];
    State<D, HEAD_TILES> state;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; tile++) {
        const int head = 8 * tile + lane / 4;
#pragma unroll
        for (int chunk = 0; chunk < D / 32; chunk++) {
            query[tile][chunk] =
                head < group_size
                    ? load16(q + first_element + head * D + 32 * chunk + 8 * (lane % 4))
                    : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            state.max[tile][i] = -INFINITY;
            state.sum[tile][i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                state.out[tile][i][j] = 0.0f;
            }
        }
    }
    attend<T, D, HEAD_TILES>(state, k_cache, v_cache, block_tables + cu_blocks[sequence], query,
                             scale_log2, start, end, kv_head, num_kv_heads, block_shift);
    share<D, HEAD_TILES>(shared, state);
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

#define ENTRY(T, SUFFIX, D, GROUP, BLOCKS)                                                         \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP_SIZE, BLOCKS)                         \
        attention_decode_##SUFFIX##_##D##_g##GROUP(                                                \
            T *out, const T *q, const T *k_cache, const T *v_cache, const int *cu_seqlens_q,       \
            const int *context_lens, const int *block_tables, const int *cu_blocks,                \
            const int *split_tokens, float *partial, uint32_t *counters, float scale_log2,         \
            int num_heads, int num_kv_heads, int block_shift) {                                    \
        attention_decode<T, D, GROUP / 8>(out, q, k_cache, v_cache, cu_seqlens_q, context_lens,    \
                                          block_tables, cu_blocks, split_tokens, partial,          \
                                          counters, scale_log2, num_heads, num_kv_heads,           \
                                          block_shift);                                            \
    }

ENTRY(__half, f16, 64, 8, 4)
ENTRY(__half, f16, 64, 16, 3)
ENTRY(__half, f16, 128, 8, 3)
ENTRY(__half, f16, 128, 16, 2)
ENTRY(__nv_bfloat16, bf16, 64, 8, 4)
ENTRY(__nv_bfloat16, bf16, 64, 16, 3)
ENTRY(__nv_bfloat16, bf16, 128, 8, 3)
ENTRY(__nv_bfloat16, bf16, 128, 16, 2)
