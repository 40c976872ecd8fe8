// What all kernels share: element types, 16-byte vectors, tensor-core products, reductions.
//
// T is __half or __nv_bfloat16 throughout. Arithmetic is in f32; results are rounded to T once.
// Entry points are `extern "C" __global__`, one for each type (suffix _f16, _bf16) and head
// dimension (_64, _128), and are launched through the driver's API: there is no host code here.
//
// Every kernel opens with wait_for_producer(). In a stream or graph of plain launches it does
// nothing. Where the launch carries CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION (sm_90
// on) the kernel starts while its predecessor still runs and waits there; what comes before the
// call may therefore touch nothing but weights.
//
// release_consumer() lets the next kernel start in the same way. Products, which fetch W while they
// wait, release after their wait, so that no more than one product waits beside one that runs.
// Norms and the attention of single tokens, which stand between two products, release before it:
// the product behind them fetches W while the one before them ends (2.5 % of a step of 32 tokens on
// an H100).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define WARP_SIZE 32
#define FULL_MASK 0xffffffffu

// Waits until all kernels before this one have finished and their writes are visible.
__device__ __forceinline__ void wait_for_producer() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its prologue once all blocks have come here.
__device__ __forceinline__ void release_consumer() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }

template <typename T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ __half from_float(float value) {
    return __float2half_rn(value);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float value) {
    return __float2bfloat16_rn(value);
}
template <> __device__ __forceinline__ float from_float(float value) { return value; }

// Two elements in one register, the first in the low half.
template <typename T> __device__ __forceinline__ uint32_t pack(float first, float second);
template <> __device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t *>(&pair);
}
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

template <typename T> __device__ __forceinline__ float2 unpack(uint32_t pair);
template <> __device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
}
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Eight elements, as f32 and back.
template <typename T> __device__ __forceinline__ void unpack8(uint4 packed, float (&values)[8]) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack<T>(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}
template <typename T> __device__ __forceinline__ uint4 pack8(const float (&values)[8]) {
    return make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                      pack<T>(values[4], values[5]), pack<T>(values[6], values[7]));
}

__device__ __forceinline__ uint4 load16(const void *source) {
    return *reinterpret_cast<const uint4 *>(source);
}
__device__ __forceinline__ void store16(void *target, uint4 value) {
    *reinterpret_cast<uint4 *>(target) = value;
}

// Adds A·B to c: A is 16×16 (row-major fragment), B 16×8 (column-major fragment), c 16×8 in f32.
// With group = lane / 4 and pair = lane % 4, a thread holds A[group][2 pair ..] in a0,
// A[group + 8][2 pair ..] in a1, the same rows at column 8 + 2 pair in a2 and a3, B[2 pair ..]
// [group] in b0, B[8 + 2 pair ..][group] in b1, and of c rows group and group + 8 at 2 pair.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1,
                                                   uint32_t a2, uint32_t a3, uint32_t b0,
                                                   uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8×8 matrix of 16-bit elements of which a thread holds row lane / 4, two columns.
__device__ __forceinline__ uint32_t transpose8x8(uint32_t row_pair) {
    uint32_t column_pair;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                 : "=r"(column_pair)
                 : "r"(row_pair));
    return column_pair;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(FULL_MASK, value, offset);
    }
    return value;
}

// Returns the sum over the block, to every thread. `scratch` has 32 floats; the call begins with
// a barrier, so that it may be used again at once.
__device__ __forceinline__ float block_sum(float value, float *scratch) {
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) {
        scratch[warp] = value;
    }
    __syncthreads();
    return warp_sum(lane < (int)(blockDim.x / WARP_SIZE) ? scratch[lane] : 0.0f);
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory asynchronously; zeros where `is_valid` is 0.
__device__ __forceinline__ void copy16_async(uint32_t target, const void *source, bool is_valid) {
    const int size = is_valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(target),
                 "l"(source), "r"(size));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until at most PENDING groups of copies are under way.
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
