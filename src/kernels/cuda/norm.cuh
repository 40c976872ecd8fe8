// A row's RMSNorm, for the kernels that norm what they read (norm.cu) or reduce (all_reduce.cu).
#pragma once

#include "common.cuh"

// A thread's share of the weight, for rows of at most 8 · blockDim.x · MAX_VECTORS elements.
template <typename T, int MAX_VECTORS>
__device__ __forceinline__ void load_weights(uint4 (&weights)[MAX_VECTORS], const T *weight,
                                             int num_vectors) {
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < num_vectors) {
            weights[i] = load16(weight + 8 * vector);
        }
    }
}

// Norms one row with the whole block. `source(vector)` returns the row's 8 elements from 8 · vector
// on. With HAS_RESIDUAL they are first added to `residual`, rounded to T and written to `sum`. All
// pointers are to the row. The row stays in registers between the two passes over it. Passes
// block_sum's barriers.
template <typename T, bool HAS_RESIDUAL, int MAX_VECTORS, typename Source>
__device__ __forceinline__ void norm_row(T *out, T *sum, Source source, const T *residual,
                                         const uint4 (&weights)[MAX_VECTORS], float eps,
                                         int num_vectors) {
    __shared__ float scratch[WARP_SIZE];
    float values[MAX_VECTORS][8];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < num_vectors) {
            // Before the source, which may have to wait for another GPU.
            const uint4 other = HAS_RESIDUAL ? load16(residual + 8 * vector) : uint4{};
            unpack8<T>(source(vector), values[i]);
            if (HAS_RESIDUAL) {
                float others[8];
                unpack8<T>(other, others);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    values[i][j] += others[j];
                }
                const uint4 rounded = pack8<T>(values[i]);
                store16(sum + 8 * vector, rounded);
                unpack8<T>(rounded, values[i]);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                squares += values[i][j] * values[i][j];
            }
        }
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / (8 * num_vectors) + eps);
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < num_vectors) {
            float factors[8];
            unpack8<T>(weights[i], factors);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                values[i][j] *= scale * factors[j];
            }
            store16(out + 8 * vector, pack8<T>(values[i]));
        }
    }
}
