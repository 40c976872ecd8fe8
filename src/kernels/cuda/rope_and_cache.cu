// rope_and_cache: bias, norm of each query and key head (Qwen3), rotary embedding, and the write
// of keys and values to the paged cache, in one pass over the output of the QKV product.
//
// Shapes:  qkv [tokens, (num_heads + 2 num_kv_heads) D], bias [the same width] or null;
//          q_norm, k_norm [D], both or null; cos, sin f32 [positions, D / 2];
//          positions, slot_mapping i32 [tokens]; q_out [tokens, num_heads, D];
//          k_cache, v_cache [num_blocks][num_kv_heads][2^block_shift][D], all of type T.
//          Slot = block · block_size + offset. A negative slot (a bucket's padding) writes no key
//          and no value; its position must still be one of the tables'.
// Form:    half-split (Llama, Qwen): element i turns with element i + D / 2.
// Launch:  grid (tokens, ⌈(num_heads + 2 num_kv_heads) / (block / 32)⌉), block a multiple of 32:
//          one warp for each head.
// Source:  own; formulas as src/kernels/cpu/kv.rs.
#include "common.cuh"

template <typename T, int D>
__device__ __forceinline__ void
rope_and_cache(T *q_out, T *k_cache, T *v_cache, const T *qkv, const T *bias, const T *q_norm,
               const T *k_norm, const float *cos, const float *sin, const int *positions,
               const int *slot_mapping, float eps, int num_heads, int num_kv_heads,
               int block_shift) {
    // A lane holds PAIRS consecutive elements of the first half and their partners.
    constexpr int PAIRS = D / 64;
    const int head = blockIdx.y * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int64_t token = blockIdx.x;
    const int num_all_heads = num_heads + 2 * num_kv_heads;
    wait_for_producer();
    release_consumer();
    if (head >= num_all_heads) {
        return;
    }
    const T *source = qkv + (token * num_all_heads + head) * D;
    float first[PAIRS], second[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int element = lane * PAIRS + i;
        first[i] = to_float(source[element]);
        second[i] = to_float(source[element + D / 2]);
        if (bias != nullptr) {
            first[i] += to_float(bias[head * D + element]);
            second[i] += to_float(bias[head * D + element + D / 2]);
        }
    }
    const bool is_value = head >= num_heads + num_kv_heads;
    if (!is_value) {
        const T *norm = head < num_heads ? q_norm : k_norm;
        if (norm != nullptr) {
            float squares = 0.0f;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                squares += first[i] * first[i] + second[i] * second[i];
            }
            const float scale = rsqrtf(warp_sum(squares) / D + eps);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const int element = lane * PAIRS + i;
                first[i] *= scale * to_float(norm[element]);
                second[i] *= scale * to_float(norm[element + D / 2]);
            }
        }
        const int64_t angles = (int64_t)positions[token] * (D / 2);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float c = cos[angles + lane * PAIRS + i];
            const float s = sin[angles + lane * PAIRS + i];
            const float rotated = first[i] * c - second[i] * s;
            second[i] = second[i] * c + first[i] * s;
            first[i] = rotated;
        }
    }
    T *target;
    if (head < num_heads) {
        target = q_out + (token * num_heads + head) * D;
    } else {
        const int slot = slot_mapping[token];
        if (slot < 0) {
            return;
        }
        const int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
        const int64_t block = slot >> block_shift;
        const int64_t offset = slot & ((1 << block_shift) - 1);
        const int64_t row = ((block * num_kv_heads + kv_head) << block_shift) + offset;
        target = (is_value ? v_cache : k_cache) + row * D;
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        target[lane * PAIRS + i] = from_float<T>(first[i]);
        target[lane * PAIRS + i + D / 2] = from_float<T>(second[i]);
    }
}

#define ENTRY(T, SUFFIX, D)                                                                        \
    extern "C" __global__ void rope_and_cache_##SUFFIX##_##D(                                      \
        T *q_out, T *k_cache, T *v_cache, const T *qkv, const T *bias, const T *q_norm,            \
        const T *k_norm, const float *cos, const float *sin, const int *positions,                 \
        const int *slot_mapping, float eps, int num_heads, int num_kv_heads, int block_shift) {    \
        rope_and_cache<T, D>(q_out, k_cache, v_cache, qkv, bias, q_norm, k_norm, cos, sin,         \
                             positions, slot_mapping, eps, num_heads, num_kv_heads, block_shift);  \
    }

ENTRY(__half, f16, 64)
ENTRY(__half, f16, 128)
ENTRY(__nv_bfloat16, bf16, 64)
ENTRY(__nv_bfloat16, bf16, 128)
