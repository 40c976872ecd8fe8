// Which tile of queries a block of attention_prefill or attention_prefill_wgmma works on.
//
// The rows of a tile are (token, head of a kv head's group) pairs, token by token: row r of tile t
// is head (128 t + r) % group of token (128 t + r) / group.
#pragma once

#include "common.cuh"

// Rows of a tile.
constexpr int ROWS = 128;

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
