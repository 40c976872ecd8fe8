// rope_and_cache: bias, norm of each query and key head (Qwen3), rotary embedding, and the write
// of keys and values to the paged cache, in one pass over the output of the QKV product.
//
// Shapes:  qkv [tokens, (num_heads + 2 num_kv_heads) D], bias [the same width] or null;
//          q_norm, k_norm [D], both or null; cos, sin f32 [positions, D / 2];
//          positions, slot_mapping i32 [tokens]; q_out [tokens, num_heads, D];
//          k_cache, v_cache [num_blocks][num_kv_heads][2^block_shift][D], all of type T; with fp8 in
//          the name the caches are E4M3: rounded from f32 to nearest, ties to even, ±448 for all
//          that is larger.
//          Slot = block · block_size + offset. A negative slot (a bucket's padding) writes no key
//          and no value; its position must still be one of the tables'.
// Names:   rope_and_cache_{f16,bf16}_{64,128}, rope_and_cache_fp8_{f16,bf16}_{64,128}.
// Form:    half-split (Llama, Qwen): element i turns with element i + D / 2.
// Launch:  grid (tokens, ⌈(num_heads + 2 num_kv_heads) / (block / 32)⌉), block a multiple of 32:
//          one warp for each head.
// Source:  own; formulas as src/kernels/cpu/kv.rs.
#include "rope.cuh"

template <typename T, typename E, int D>
__device__ __forceinline__ void
rope_and_cache(T *q_out, E *k_cache, E *v_cache, const T *qkv, const T *bias, const T *q_norm,
               const T *k_norm, const float *cos, const float *sin, const int *positions,
               const int *slot_mapping, float eps, int num_heads, int num_kv_heads,
               int block_shift) {
    const int head = blockIdx.y * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
    const int64_t token = blockIdx.x;
    const int num_all_heads = num_heads + 2 * num_kv_heads;
    wait_for_producer();
    release_consumer();
    if (head >= num_all_heads) {
        return;
    }
    Head<D> elements;
    load_head<T, D>(elements, qkv + (token * num_all_heads + head) * D);
    if (bias != nullptr) {
        Head<D> biases;
        load_head<T, D>(biases, bias + head * D);
#pragma unroll
        for (int i = 0; i < Head<D>::PAIRS; i++) {
            elements.first[i] += biases.first[i];
            elements.second[i] += biases.second[i];
        }
    }
    const bool is_value = head >= num_heads + num_kv_heads;
    if (!is_value) {
        const T *norm = head < num_heads ? q_norm : k_norm;
        if (norm != nullptr) {
            norm_head<T, D>(elements, norm, eps);
        }
        Angles<D> angles;
        load_angles<D>(angles, cos, sin, positions[token]);
        turn_head<D>(elements, angles);
    }
    if (head < num_heads) {
        store_head<T, D>(q_out + (token * num_heads + head) * D, elements);
        return;
    }
    const int slot = slot_mapping[token];
    if (slot < 0) {
        return;
    }
    const int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
    const int64_t block = slot >> block_shift;
    const int64_t offset = slot & ((1 << block_shift) - 1);
    const int64_t row = ((block * num_kv_heads + kv_head) << block_shift) + offset;
    store_head<E, D>((is_value ? v_cache : k_cache) + row * D, elements);
}

#define ENTRY(T, E, SUFFIX, D)                                                                     \
    extern "C" __global__ void rope_and_cache_##SUFFIX##_##D(                                      \
        T *q_out, E *k_cache, E *v_cache, const T *qkv, const T *bias, const T *q_norm,            \
        const T *k_norm, const float *cos, const float *sin, const int *positions,                 \
        const int *slot_mapping, float eps, int num_heads, int num_kv_heads, int block_shift) {    \
        rope_and_cache<T, E, D>(q_out, k_cache, v_cache, qkv, bias, q_norm, k_norm, cos, sin,      \
                                positions, slot_mapping, eps, num_heads, num_kv_heads,             \
                                block_shift);                                                      \
    }
#define ENTRIES(T, SUFFIX, D)                                                                      \
    ENTRY(T, T, SUFFIX, D)                                                                         \
    ENTRY(T, E4m3, fp8_##SUFFIX, D)

ENTRIES(__half, f16, 64)
ENTRIES(__half, f16, 128)
ENTRIES(__nv_bfloat16, bf16, 64)
ENTRIES(__nv_bfloat16, bf16, 128)
