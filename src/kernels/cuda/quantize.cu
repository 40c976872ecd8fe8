// quantize_rows: rows of a matrix to E4M3, each with its own scale.
//
// Shapes:  x [rows, width] of f32, f16 or bf16; out E4M3 [rows, width], scales f32 [rows]; all
//          row-major. out[r][c] = x[r][c] · (1 / scales[r]) in f32, rounded to nearest, ties to
//          even; scales[r] = max |x[r]| / 448, so that the largest magnitude becomes E4M3's.
//          A row of zeros has the scale 1, and no scale is below 1e-30, whose inverse is finite.
//          NaN stays NaN; a row with an infinite element becomes NaN and zeros.
// Names:   quantize_rows_{f32,f16,bf16}.
// Launch:  grid (rows), block a multiple of 32, at most 1024; fastest with at least width / 32
//          threads, which then read the row once.
// Limits:  sm_90a (the products that read it are). width is a multiple of 8; pointers on 16 bytes.
// Source:  own.
#include "e4m3.cuh"

#ifdef HAS_HOPPER

#define ENTRY(T, SUFFIX)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024) quantize_rows_##SUFFIX(                     \
        uint8_t *out, float *scales, const T *x, int width) {                                      \
        /* First, so that the product after this one fetches its weight while x is computed. */    \
        release_consumer();                                                                        \
        wait_for_producer();                                                                       \
        const int64_t row = blockIdx.x;                                                            \
        quantize_row(out + row * width, scales + row, x + row * width, width);                     \
    }

ENTRY(float, f32)
ENTRY(__half, f16)
ENTRY(__nv_bfloat16, bf16)

#else

WITHOUT_HOPPER(quantize)

#endif
