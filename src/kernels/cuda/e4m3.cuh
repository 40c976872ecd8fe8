// Rows to E4M3, each with its own scale: for the kernels that only do that (quantize.cu) or do it to
// what they wrote (norm.cu). quantize.cu says how values are rounded.
#pragma once

#include "e4m3_pairs.cuh"
#include "hopper.cuh"

#ifdef HAS_HOPPER

// Vectors of a row that a thread keeps.
constexpr int MAX_ROW_VECTORS = 4;
constexpr float SMALLEST_SCALE = 1e-30f;

// Eight elements from the row's element 8 · vector on.
template <typename T>
__device__ __forceinline__ void load_vector(float (&values)[8], const T *row, int vector) {
    unpack8<T>(load16(row + 8 * vector), values);
}
template <>
__device__ __forceinline__ void load_vector(float (&values)[8], const float *row, int vector) {
    const float4 low = *reinterpret_cast<const float4 *>(row + 8 * vector);
    const float4 high = *reinterpret_cast<const float4 *>(row + 8 * vector + 4);
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__device__ __forceinline__ float largest_of(float largest, const float (&values)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        largest = fmaxf(largest, fabsf(values[j]));
    }
    return largest;
}

// Returns the largest value of the block's threads, to every thread.
__device__ __forceinline__ float block_max(float value) {
    __shared__ float scratch[WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int round = 0; round < 2; round++) {
#pragma unroll
        for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
            value = fmaxf(value, __shfl_xor_sync(FULL_MASK, value, offset));
        }
        if (round == 0) {
            if (lane == 0) {
                scratch[threadIdx.x / WARP_SIZE] = value;
            }
            __syncthreads();
            value = lane < (int)(blockDim.x / WARP_SIZE) ? scratch[lane] : 0.0f;
        }
    }
    return value;
}

__device__ __forceinline__ void store_e4m3(uint8_t *target, const float (&values)[8],
                                           float inverse) {
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        scaled[i] = values[i] * inverse;
    }
    *reinterpret_cast<uint2 *>(target) = pack8_e4m3(scaled);
}

// Quantises one row with the whole block, a thread the vectors threadIdx.x + i · blockDim.x. All
// pointers are to the row or its scale. MAX_VECTORS stay in registers, more are read twice.
template <typename T, int MAX_VECTORS = MAX_ROW_VECTORS>
__device__ __forceinline__ void quantize_row(uint8_t *out, float *scale_out, const T *x,
                                             int width) {
    const int num_vectors = width / 8;
    const int rest = threadIdx.x + MAX_VECTORS * blockDim.x;
    float values[MAX_VECTORS][8];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < num_vectors) {
            load_vector(values[i], x, vector);
            largest = largest_of(largest, values[i]);
        }
    }
    for (int vector = rest; vector < num_vectors; vector += blockDim.x) {
        float more[8];
        load_vector(more, x, vector);
        largest = largest_of(largest, more);
    }
    largest = block_max(largest);
    const float scale = largest > 0.0f ? fmaxf(largest / LARGEST_E4M3, SMALLEST_SCALE) : 1.0f;
    const float inverse = 1.0f / scale;
    if (threadIdx.x == 0) {
        *scale_out = scale;
    }
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < num_vectors) {
            store_e4m3(out + 8 * vector, values[i], inverse);
        }
    }
    for (int vector = rest; vector < num_vectors; vector += blockDim.x) {
        float more[8];
        load_vector(more, x, vector);
        store_e4m3(out + 8 * vector, more, inverse);
    }
}

#endif  // HAS_HOPPER
