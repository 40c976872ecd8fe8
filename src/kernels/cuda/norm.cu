// rms_norm, add_rms_norm: x / sqrt(mean(x²) + eps) · weight, alone or after adding a residual.
//
// Shapes:  x, residual, out, sum [rows, width], weight [width]; all of type T, row-major.
//          add_rms_norm rounds x + residual to T, writes it to `sum` and norms the rounded value.
//          `sum` may be `residual`, `out` may be `x`.
// Launch:  grid (rows), block a multiple of 32, at most 1024 and at least width / 32.
// Limits:  width is a multiple of 8 and at most 32,768; pointers on 16 bytes.
// Source:  own. A row stays in registers between the two passes over it.
#include "common.cuh"

constexpr int MAX_VECTORS = 4;

template <typename T, bool HAS_RESIDUAL>
__device__ __forceinline__ void norm_row(T *out, T *sum, const T *x, const T *residual,
                                         const T *weight, float eps, int width) {
    __shared__ float scratch[WARP_SIZE];
    const int num_vectors = width / 8;
    const int64_t row = (int64_t)blockIdx.x * width;
    uint4 weights[MAX_VECTORS];
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < num_vectors) {
            weights[i] = load16(weight + 8 * vector);
        }
    }
    wait_for_producer();
    release_consumer();
    float values[MAX_VECTORS][8];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < num_vectors) {
            unpack8<T>(load16(x + row + 8 * vector), values[i]);
            if (HAS_RESIDUAL) {
                float others[8];
                unpack8<T>(load16(residual + row + 8 * vector), others);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    values[i][j] += others[j];
                }
                const uint4 rounded = pack8<T>(values[i]);
                store16(sum + row + 8 * vector, rounded);
                unpack8<T>(rounded, values[i]);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                squares += values[i][j] * values[i][j];
            }
        }
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
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
            store16(out + row + 8 * vector, pack8<T>(values[i]));
        }
    }
}

#define ENTRY(T, SUFFIX)                                                                           \
    extern "C" __global__ void rms_norm_##SUFFIX(T *out, const T *x, const T *weight, float eps,   \
                                                 int width) {                                      \
        norm_row<T, false>(out, nullptr, x, nullptr, weight, eps, width);                          \
    }                                                                                              \
    extern "C" __global__ void add_rms_norm_##SUFFIX(T *out, T *sum, const T *x,                   \
                                                     const T *residual, const T *weight,           \
                                                     float eps, int width) {                       \
        norm_row<T, true>(out, sum, x, residual, weight, eps, width);                              \
    }

ENTRY(__half, f16)
ENTRY(__nv_bfloat16, bf16)
