// rms_norm, add_rms_norm: x / sqrt(mean(x²) + eps) · weight, alone or after adding a residual.
//
// Shapes:  x, residual, out, sum [rows, width], weight [width]; all of type T, row-major.
//          add_rms_norm rounds x + residual to T, writes it to `sum` and norms the rounded value.
//          `sum` may be `residual`, `out` may be `x`.
//          rms_norm_fp8, add_rms_norm_fp8 (sm_90a) also write `out` as quantize_rows would make it of
//          it: elements E4M3 [rows, width] and scales f32 [rows].
// Names:   {add_,}rms_norm_{fp8_,}{f16,bf16}, with _wide behind it for rows of more than 8,192.
// Launch:  grid (rows), block a multiple of 32, at most 1024 and at least width / 8; of _wide at
//          least width / 32.
// Limits:  width is a multiple of 8 and at most 8,192, of _wide at most 32,768; pointers on 16 bytes.
// Source:  own.
#include "e4m3.cuh"
#include "norm.cuh"

// Vectors of a thread. One leaves registers for four blocks of 3,584 columns on a multiprocessor,
// four for two, which do not keep the memory busy (66 µs for 8,192 rows on an H100).
constexpr int VECTORS = 1;
constexpr int WIDE_VECTORS = 4;

template <typename T, bool HAS_RESIDUAL, int MAX_VECTORS>
__device__ __forceinline__ void norm_rows(T *out, T *sum, const T *x, const T *residual,
                                          const T *weight, float eps, int width) {
    const int num_vectors = width / 8;
    const int64_t row = (int64_t)blockIdx.x * width;
    uint4 weights[MAX_VECTORS];
    load_weights(weights, weight, num_vectors);
    release_consumer();
    wait_for_producer();
    const auto source = [=](int vector) { return load16(x + row + 8 * vector); };
    norm_row<T, HAS_RESIDUAL>(out + row, sum + row, source, residual + row, weights, eps,
                              num_vectors);
}

#define ENTRY(T, SUFFIX, VECTORS)                                                                  \
    extern "C" __global__ void rms_norm_##SUFFIX(T *out, const T *x, const T *weight, float eps,   \
                                                 int width) {                                      \
        norm_rows<T, false, VECTORS>(out, nullptr, x, nullptr, weight, eps, width);                \
    }                                                                                              \
    extern "C" __global__ void add_rms_norm_##SUFFIX(T *out, T *sum, const T *x,                   \
                                                     const T *residual, const T *weight,           \
                                                     float eps, int width) {                       \
        norm_rows<T, true, VECTORS>(out, sum, x, residual, weight, eps, width);                    \
    }

ENTRY(__half, f16, VECTORS)
ENTRY(__half, f16_wide, WIDE_VECTORS)
ENTRY(__nv_bfloat16, bf16, VECTORS)
ENTRY(__nv_bfloat16, bf16_wide, WIDE_VECTORS)

#ifdef HAS_HOPPER

// A thread reads again what it has written itself.
template <typename T, int MAX_VECTORS>
__device__ __forceinline__ void quantize_rows(uint8_t *elements, float *scales, const T *out,
                                              int width) {
    const int64_t row = blockIdx.x;
    quantize_row<T, MAX_VECTORS>(elements + row * width, scales + row, out + row * width, width);
}

#define ENTRY_FP8(T, SUFFIX, VECTORS)                                                              \
    extern "C" __global__ void rms_norm_fp8_##SUFFIX(T *out, uint8_t *elements, float *scales,     \
                                                     const T *x, const T *weight, float eps,       \
                                                     int width) {                                  \
        norm_rows<T, false, VECTORS>(out, nullptr, x, nullptr, weight, eps, width);                \
        quantize_rows<T, VECTORS>(elements, scales, out, width);                                   \
    }                                                                                              \
    extern "C" __global__ void add_rms_norm_fp8_##SUFFIX(T *out, uint8_t *elements, float *scales, \
                                                         T *sum, const T *x, const T *residual,    \
                                                         const T *weight, float eps, int width) {  \
        norm_rows<T, true, VECTORS>(out, sum, x, residual, weight, eps, width);                    \
        quantize_rows<T, VECTORS>(elements, scales, out, width);                                   \
    }

ENTRY_FP8(__half, f16, VECTORS)
ENTRY_FP8(__half, f16_wide, WIDE_VECTORS)
ENTRY_FP8(__nv_bfloat16, bf16, VECTORS)
ENTRY_FP8(__nv_bfloat16, bf16_wide, WIDE_VECTORS)

#endif  // HAS_HOPPER
