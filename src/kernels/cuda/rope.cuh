// A head of the QKV product on its way to the cache or to attention: bias, norm, rotation, by one
// warp. Used by rope_and_cache.cu and project.cuh.
//
// A lane holds PAIRS consecutive elements of the head's first half and their partners in the
// second: element i turns with element i + D / 2 (half-split form: Llama, Qwen).
#pragma once

#include "e4m3_pairs.cuh"

template <int D> struct Head {
    static constexpr int PAIRS = D / 64;
    float first[PAIRS];
    float second[PAIRS];
};

template <int D> struct Angles {
    float cos[Head<D>::PAIRS];
    float sin[Head<D>::PAIRS];
};

// PAIRS elements of which the first has an even index where there are two.
template <typename T, int PAIRS>
__device__ __forceinline__ void load_elements(float (&values)[PAIRS], const T *source) {
    if constexpr (PAIRS == 2) {
        const float2 pair = unpack<T>(*reinterpret_cast<const uint32_t *>(source));
        values[0] = pair.x;
        values[1] = pair.y;
    } else {
        values[0] = to_float(*source);
    }
}
template <typename T, int PAIRS>
__device__ __forceinline__ void store_elements(T *target, const float (&values)[PAIRS]) {
    if constexpr (PAIRS == 2) {
        *reinterpret_cast<uint32_t *>(target) = pack<T>(values[0], values[1]);
    } else {
        *target = from_float<T>(values[0]);
    }
}

template <typename T, int D>
__device__ __forceinline__ void load_head(Head<D> &head, const T *source) {
    const int element = threadIdx.x % WARP_SIZE * Head<D>::PAIRS;
    load_elements<T>(head.first, source + element);
    load_elements<T>(head.second, source + element + D / 2);
}
// E is T, or E4M3 for a cache of that.
template <typename E, int D>
__device__ __forceinline__ void store_head(E *target, const Head<D> &head) {
    target += threadIdx.x % WARP_SIZE * Head<D>::PAIRS;
    if constexpr (!IS_E4M3<E>) {
        store_elements<E>(target, head.first);
        store_elements<E>(target + D / 2, head.second);
    } else if constexpr (Head<D>::PAIRS == 2) {
        *reinterpret_cast<uint16_t *>(target) = pack_e4m3(head.first[0], head.first[1]);
        *reinterpret_cast<uint16_t *>(target + D / 2) = pack_e4m3(head.second[0], head.second[1]);
    } else {
        const uint32_t pair = pack_e4m3(head.first[0], head.second[0]);
        target[0].code = pair & 0xff;
        target[D / 2].code = pair >> 8;
    }
}

// The tables [positions, D / 2] at a position.
template <int D>
__device__ __forceinline__ void load_angles(Angles<D> &angles, const float *cos, const float *sin,
                                            int position) {
    const int64_t element =
        (int64_t)position * (D / 2) + threadIdx.x % WARP_SIZE * Head<D>::PAIRS;
#pragma unroll
    for (int i = 0; i < Head<D>::PAIRS; i++) {
        angles.cos[i] = cos[element + i];
        angles.sin[i] = sin[element + i];
    }
}

// RMSNorm of the head (Qwen3); the whole warp calls it.
template <typename T, int D>
__device__ __forceinline__ void norm_head(Head<D> &head, const T *weight, float eps) {
    Head<D> weights;
    load_head<T, D>(weights, weight);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < Head<D>::PAIRS; i++) {
        squares += head.first[i] * head.first[i] + head.second[i] * head.second[i];
    }
    const float scale = rsqrtf(warp_sum(squares) / D + eps);
#pragma unroll
    for (int i = 0; i < Head<D>::PAIRS; i++) {
        head.first[i] *= scale * weights.first[i];
        head.second[i] *= scale * weights.second[i];
    }
}

template <int D>
__device__ __forceinline__ void turn_head(Head<D> &head, const Angles<D> &angles) {
#pragma unroll
    for (int i = 0; i < Head<D>::PAIRS; i++) {
        const float turned = head.first[i] * angles.cos[i] - head.second[i] * angles.sin[i];
        head.second[i] = head.second[i] * angles.cos[i] + head.first[i] * angles.sin[i];
        head.first[i] = turned;
    }
}
