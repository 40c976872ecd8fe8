// A head of the QKV product on its way to the cache or to attention: bias, norm, rotation. Used by
// rope_and_cache.cu and project.cuh.
//
// LANES lanes hold a head, each PAIRS consecutive elements of its first half and their partners in
// the second: element i turns with element i + D / 2 (half-split form: Llama, Qwen). A whole warp
// takes a head soonest; D / 16 lanes read and write vectors of 16 bytes. Both give the same bits.
#pragma once

#include "e4m3_pairs.cuh"

template <int D, int LANES = WARP_SIZE> struct Head {
    static constexpr int PAIRS = D / 2 / LANES;
    static_assert(PAIRS == 1 || PAIRS == 2 || PAIRS == 8, "what loads and stores know");
    float first[PAIRS];
    float second[PAIRS];
};

template <int D, int LANES = WARP_SIZE> struct Angles {
    float cos[Head<D, LANES>::PAIRS];
    float sin[Head<D, LANES>::PAIRS];
};

// PAIRS elements, aligned to as many.
template <typename T, int PAIRS>
__device__ __forceinline__ void load_elements(float (&values)[PAIRS], const T *source) {
    if constexpr (PAIRS == 8) {
        unpack8<T>(load16(source), values);
    } else if constexpr (PAIRS == 2) {
        const float2 pair = unpack<T>(*reinterpret_cast<const uint32_t *>(source));
        values[0] = pair.x;
        values[1] = pair.y;
    } else {
        values[0] = to_float(*source);
    }
}
template <typename T, int PAIRS>
__device__ __forceinline__ void store_elements(T *target, const float (&values)[PAIRS]) {
    if constexpr (PAIRS == 8) {
        store16(target, pack8<T>(values));
    } else if constexpr (PAIRS == 2) {
        *reinterpret_cast<uint32_t *>(target) = pack<T>(values[0], values[1]);
    } else {
        *target = from_float<T>(values[0]);
    }
}
__device__ __forceinline__ void store_elements(E4m3 *target, const float (&values)[8]) {
    *reinterpret_cast<uint2 *>(target) = pack8_e4m3(values);
}

template <typename T, int D, int LANES>
__device__ __forceinline__ void load_head(Head<D, LANES> &head, const T *source) {
    const int element = threadIdx.x % LANES * Head<D, LANES>::PAIRS;
    load_elements<T>(head.first, source + element);
    load_elements<T>(head.second, source + element + D / 2);
}
// E is T, or E4M3 for a cache of that.
template <typename E, int D, int LANES>
__device__ __forceinline__ void store_head(E *target, const Head<D, LANES> &head) {
    constexpr int PAIRS = Head<D, LANES>::PAIRS;
    target += threadIdx.x % LANES * PAIRS;
    if constexpr (!IS_E4M3<E> || PAIRS == 8) {
        store_elements(target, head.first);
        store_elements(target + D / 2, head.second);
    } else if constexpr (PAIRS == 2) {
        *reinterpret_cast<uint16_t *>(target) = pack_e4m3(head.first[0], head.first[1]);
        *reinterpret_cast<uint16_t *>(target + D / 2) = pack_e4m3(head.second[0], head.second[1]);
    } else {
        const uint32_t pair = pack_e4m3(head.first[0], head.second[0]);
        target[0].code = pair & 0xff;
        target[D / 2].code = pair >> 8;
    }
}

// COUNT f32, aligned to four of them where there are as many.
template <int COUNT>
__device__ __forceinline__ void load_floats(float (&values)[COUNT], const float *source) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 four = *reinterpret_cast<const float4 *>(source + i);
            values[i] = four.x;
            values[i + 1] = four.y;
            values[i + 2] = four.z;
            values[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            values[i] = source[i];
        }
    }
}

// The tables [positions, D / 2] at a position.
template <int D, int LANES>
__device__ __forceinline__ void load_angles(Angles<D, LANES> &angles, const float *cos,
                                            const float *sin, int position) {
    constexpr int PAIRS = Head<D, LANES>::PAIRS;
    const int64_t element = (int64_t)position * (D / 2) + threadIdx.x % LANES * PAIRS;
    load_floats(angles.cos, cos + element);
    load_floats(angles.sin, sin + element);
}

// RMSNorm of the head (Qwen3); the whole warp calls it.
template <typename T, int D, int LANES>
__device__ __forceinline__ void norm_head(Head<D, LANES> &head, const T *weight, float eps) {
    // As many sums as a whole warp's lanes make of these elements, added in the warp's order.
    constexpr int SHARE = D / 2 / WARP_SIZE;
    constexpr int SUMS = Head<D, LANES>::PAIRS / SHARE;
    Head<D, LANES> weights;
    load_head(weights, weight);
    float squares[SUMS];
#pragma unroll
    for (int sum = 0; sum < SUMS; sum++) {
        squares[sum] = 0.0f;
#pragma unroll
        for (int i = sum * SHARE; i < (sum + 1) * SHARE; i++) {
            squares[sum] += head.first[i] * head.first[i] + head.second[i] * head.second[i];
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) {
            squares[sum] += __shfl_xor_sync(FULL_MASK, squares[sum], offset);
        }
    }
#pragma unroll
    for (int half = SUMS / 2; half > 0; half /= 2) {
#pragma unroll
        for (int sum = 0; sum < half; sum++) {
            squares[sum] += squares[sum + half];
        }
    }
    const float scale = rsqrtf(squares[0] / D + eps);
#pragma unroll
    for (int i = 0; i < Head<D, LANES>::PAIRS; i++) {
        head.first[i] *= scale * weights.first[i];
        head.second[i] *= scale * weights.second[i];
    }
}

template <int D, int LANES>
__device__ __forceinline__ void turn_head(Head<D, LANES> &head, const Angles<D, LANES> &angles) {
#pragma unroll
    for (int i = 0; i < Head<D, LANES>::PAIRS; i++) {
        const float turned = head.first[i] * angles.cos[i] - head.second[i] * angles.sin[i];
        head.second[i] = head.second[i] * angles.cos[i] + head.first[i] * angles.sin[i];
        head.first[i] = turned;
    }
}
