// E4M3 elements to and from other types, two at a time, on every architecture. The formulas without
// the instructions of sm_89 are those of src/kernels/cpu/e4m3.rs.
#pragma once

#include "common.cuh"

// An element of an FP8 cache.
struct E4m3 {
    uint8_t code;
};

template <typename E> constexpr bool IS_E4M3 = false;
template <> constexpr bool IS_E4M3<E4m3> = true;

constexpr float LARGEST_E4M3 = 448.0f;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define HAS_E4M3_CASTS
#endif

#ifndef HAS_E4M3_CASTS
// The nearest code, of two as near the even one.
__device__ __forceinline__ uint32_t e4m3_code(float value) {
    const uint32_t bits = __float_as_uint(value);
    const float magnitude = fminf(fabsf(value), LARGEST_E4M3);
    const uint32_t kept = __float_as_uint(magnitude);
    // Of 23 bits of mantissa 20 go; the biases of the exponents are 127 and 7.
    const uint32_t normal = ((kept + 0x7ffff + (kept >> 20 & 1)) >> 20) - (120 << 3);
    // Next to 2^14 neighbouring f32 are 2^-9 apart, as the smallest codes are.
    const uint32_t subnormal = __float_as_uint(magnitude + 16384.0f) - __float_as_uint(16384.0f);
    const uint32_t code = magnitude < 0.015625f ? subnormal : normal;
    return (bits >> 24 & 0x80) | (isnan(value) ? 0x7f : code);
}
#endif

// Two elements in 16 bits, the first in the low half; what is too large becomes ±448.
__device__ __forceinline__ uint32_t pack_e4m3(float first, float second) {
#ifdef HAS_E4M3_CASTS
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return e4m3_code(first) | e4m3_code(second) << 8;
#endif
}

// Eight elements.
__device__ __forceinline__ uint2 pack8_e4m3(const float (&values)[8]) {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        words[i] = pack_e4m3(values[4 * i], values[4 * i + 1]) |
                   pack_e4m3(values[4 * i + 2], values[4 * i + 3]) << 16;
    }
    return make_uint2(words[0], words[1]);
}

// The two elements in the low 16 bits as a pair of T, exactly.
template <typename T> __device__ __forceinline__ uint32_t from_e4m3(uint32_t pair);
template <> __device__ __forceinline__ uint32_t from_e4m3<__half>(uint32_t pair) {
#ifdef HAS_E4M3_CASTS
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
    return halves;
#else
    // The codes as upper bytes, then one bit further down but for the sign: f16 of a 256th of the
    // values, because the biases of the exponents, 15 and 7, differ by 8. NaN is 480 / 256 by then.
    const uint32_t codes = __byte_perm(pair, 0, 0x1404);
    const uint32_t bits = (codes & 0x80008000u) | (codes & 0x7f007f00u) >> 1;
    const __half2 small = *reinterpret_cast<const __half2 *>(&bits);
    const uint32_t is_nan = __heq2_mask(__habs2(small), __float2half2_rn(1.875f));
    const __half2 values = __hmul2(small, __float2half2_rn(256.0f));
    return *reinterpret_cast<const uint32_t *>(&values) | is_nan;
#endif
}
template <> __device__ __forceinline__ uint32_t from_e4m3<__nv_bfloat16>(uint32_t pair) {
    const float2 values = unpack<__half>(from_e4m3<__half>(pair));
    return pack<__nv_bfloat16>(values.x, values.y);
}

// Sixteen elements as two vectors of T.
template <typename T>
__device__ __forceinline__ void widen16(uint4 codes, uint4 &first, uint4 &second) {
    first = make_uint4(from_e4m3<T>(codes.x), from_e4m3<T>(codes.x >> 16), from_e4m3<T>(codes.y),
                       from_e4m3<T>(codes.y >> 16));
    second = make_uint4(from_e4m3<T>(codes.z), from_e4m3<T>(codes.z >> 16), from_e4m3<T>(codes.w),
                        from_e4m3<T>(codes.w >> 16));
}
