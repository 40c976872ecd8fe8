// silu_and_mul, embedding, gather_rows, copy_blocks: what moves data and little else.
//
// silu_and_mul   out[r][c] = silu(gate_up[r][c]) · gate_up[r][width + c]
//                gate_up [rows, 2 width], out [rows, width]; grid (rows, ⌈width / (8 block)⌉).
// embedding      out[r] = table[ids[r] − first_id], zeros where the id is not in the table's
//                num_ids ids (ranks that share a vocabulary add their results); ids i32 [rows],
//                table [num_ids, width], out [rows, width]; grid (rows, ⌈width / (8 block)⌉).
//                An id below 0 is drawn[-1 - id]: what row -1 - id of the step before drew (u32).
// gather_rows    out[r] = x[rows[r]], zeros where rows[r] < 0 (a bucket's padding); rows i32;
//                grid (rows, ⌈width / (8 block)⌉).
// copy_blocks    Copies whole blocks of the KV cache, pairs i32 [n ≤ 128][source, target], by value.
//                No target may be another pair's source or target. A cache's layers lie
//                layer_stride bytes apart, its blocks block_bytes apart.
//                grid (chunks, n, layers), any number of chunks; one launch for keys and one for
//                values.
//
// All read ids and rows from device memory. Block: any multiple of 32. width is a multiple of 8,
// block_bytes of 16; pointers on 16 bytes.
// Source: own.
#include "common.cuh"

template <typename T>
__device__ __forceinline__ void silu_and_mul(T *out, const T *gate_up, int width) {
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    wait_for_producer();
    release_consumer();
    if (column >= width) {
        return;
    }
    const T *row = gate_up + (int64_t)blockIdx.x * 2 * width + column;
    float gates[8], ups[8];
    unpack8<T>(load16(row), gates);
    unpack8<T>(load16(row + width), ups);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        ups[i] *= gates[i] / (1.0f + __expf(-gates[i]));
    }
    store16(out + (int64_t)blockIdx.x * width + column, pack8<T>(ups));
}

template <typename T>
__device__ __forceinline__ void copy_row(T *out, const T *table, int64_t row, int64_t num_rows,
                                         int width) {
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (column >= width) {
        return;
    }
    const bool is_there = row >= 0 && row < num_rows;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    store16(out + (int64_t)blockIdx.x * width + column,
            is_there ? load16(table + row * width + column) : zeros);
}

// A parameter, so that a launch needs nothing in memory that a later one could overwrite.
struct BlockPairs {
    int2 pairs[128];
};

extern "C" __global__ void copy_blocks(uint4 *cache, const __grid_constant__ BlockPairs pairs,
                                       int64_t layer_stride, int64_t block_bytes) {
    wait_for_producer();
    release_consumer();
    const int source = pairs.pairs[blockIdx.y].x;
    const int target = pairs.pairs[blockIdx.y].y;
    const int64_t block_vectors = block_bytes / 16;
    uint4 *layer = cache + blockIdx.z * (layer_stride / 16);
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < block_vectors;
         i += gridDim.x * blockDim.x) {
        layer[target * block_vectors + i] = layer[source * block_vectors + i];
    }
}

#define ENTRY(T, SUFFIX)                                                                           \
    extern "C" __global__ void silu_and_mul_##SUFFIX(T *out, const T *gate_up, int width) {        \
        silu_and_mul(out, gate_up, width);                                                         \
    }                                                                                              \
    extern "C" __global__ void embedding_##SUFFIX(T *out, const T *table, const int *ids,          \
                                                  const uint32_t *drawn, uint32_t first_id,        \
                                                  int num_ids, int width) {                        \
        wait_for_producer();                                                                       \
        release_consumer();                                                                        \
        const int id = ids[blockIdx.x];                                                            \
        const int64_t token = id < 0 ? (int64_t)drawn[-1 - id] : (int64_t)id;                      \
        copy_row(out, table, token - first_id, num_ids, width);                                    \
    }                                                                                              \
    extern "C" __global__ void gather_rows_##SUFFIX(T *out, const T *x, const int *rows,           \
                                                    int num_rows, int width) {                     \
        wait_for_producer();                                                                       \
        release_consumer();                                                                        \
        copy_row(out, x, rows[blockIdx.x], num_rows, width);                                       \
    }

ENTRY(__half, f16)
ENTRY(__nv_bfloat16, bf16)
