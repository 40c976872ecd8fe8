// convert: changes the element type of weights while they are loaded.
//
// Names:   convert_{f32,f16,bf16}_{f16,bf16}.
// Shapes:  out and x, any number of elements; for 16-bit types `out` may be `x`.
// Launch:  grid (any), block (any).
// Rounding: to nearest, ties to even; a value beyond f16's range becomes infinite.
// Source:  own.
#include "common.cuh"

template <typename From, typename To>
__device__ void convert(To *out, const From *x, int64_t num_elements) {
    wait_for_producer();
    release_consumer();
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < num_elements; i += step) {
        out[i] = from_float<To>(to_float(x[i]));
    }
}

#define CONVERT(from_name, From, to_name, To)                                                      \
    extern "C" __global__ void convert_##from_name##_##to_name(To *out, const From *x,             \
                                                               int64_t num_elements) {             \
        convert<From, To>(out, x, num_elements);                                                   \
    }

CONVERT(f32, float, f16, __half)
CONVERT(f32, float, bf16, __nv_bfloat16)
CONVERT(bf16, __nv_bfloat16, f16, __half)
CONVERT(f16, __half, bf16, __nv_bfloat16)
