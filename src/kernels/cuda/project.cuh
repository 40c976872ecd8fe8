// A block's step from the QKV product to the queries of one kv head's group, for
// attention_decode.cu: rope_and_cache for one token, with the queries left in shared memory.
#pragma once

#include "rope.cuh"

// What rope_attention_decode has in place of queries.
template <typename T> struct Projected {
    const T *qkv;
    const T *q_norm;
    const T *k_norm;
    const float *cos;
    const float *sin;
    const int *positions;
    const int *slot_mapping;
    float eps;
};

// Queries of a block's group; eight columns more, so that the rows of a product's operand lie in
// different banks.
template <typename T, int D, int HEADS> using Queries = T[HEADS][D + 8];

// Norms and turns the group's queries into `queries` and, if `has_newest`, writes the token's key
// and value to the cache; ends with a barrier.
template <typename T, typename E, int D, int HEADS, int WARPS>
__device__ __forceinline__ void
project(Queries<T, D, HEADS> &queries, const Projected<T> &from, const Angles<D> &angles,
        E *k_cache, E *v_cache, int token, int kv_head, int num_heads, int num_kv_heads,
        int block_shift, bool has_newest) {
    // A warp's rows: every WARPS-th of the group's queries, the key and the value.
    constexpr int MAX_ROWS = (HEADS + 2 + WARPS - 1) / WARPS;
    const int group_size = num_heads / num_kv_heads;
    const int num_rows = has_newest ? group_size + 2 : group_size;
    const int warp = threadIdx.x / WARP_SIZE;
    const T *source = from.qkv + (int64_t)token * (num_heads + 2 * num_kv_heads) * D;
    Head<D> heads[MAX_ROWS];
#pragma unroll
    for (int i = 0; i < MAX_ROWS; i++) {
        const int row = warp + i * WARPS;
        const int head = row < group_size ? kv_head * group_size + row
                                          : num_heads + kv_head + (row - group_size) * num_kv_heads;
        if (row < num_rows) {
            load_head(heads[i], source + head * D);
        }
    }
    const int slot = has_newest ? from.slot_mapping[token] : -1;
    const int64_t block = slot >> block_shift;
    const int64_t offset = slot & ((1 << block_shift) - 1);
    const int64_t place = (((block * num_kv_heads + kv_head) << block_shift) + offset) * D;
#pragma unroll
    for (int i = 0; i < MAX_ROWS; i++) {
        const int row = warp + i * WARPS;
        if (row >= num_rows) {
            break;
        }
        if (row <= group_size) {
            const T *norm = row < group_size ? from.q_norm : from.k_norm;
            if (norm != nullptr) {
                norm_head(heads[i], norm, from.eps);
            }
            turn_head(heads[i], angles);
        }
        if (row < group_size) {
            store_head(queries[row], heads[i]);
        } else if (slot >= 0) {
            store_head((row == group_size ? k_cache : v_cache) + place, heads[i]);
        }
    }
    __syncthreads();
}
