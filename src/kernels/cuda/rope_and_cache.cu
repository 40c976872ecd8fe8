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
// Launch:  grid (tokens), block any multiple of 32: D / 16 lanes take a head, and best three heads
//          one after another.
// Source:  own; formulas as src/kernels/cpu/kv.rs.
#include "rope.cuh"

// Heads that a thread reads before it turns the first, which all have the same angles.
constexpr int HEADS = 3;

template <typename T, typename E, int D>
__device__ __forceinline__ void
rope_and_cache(T *q_out, E *k_cache, E *v_cache, const T *qkv, const T *bias, const T *q_norm,
               const T *k_norm, const float *cos, const float *sin, const int *positions,
               const int *slot_mapping, float eps, int num_heads, int num_kv_heads,
               int block_shift) {
    constexpr int LANES = D / 16;
    const int stride = blockDim.x / LANES;
    const int64_t token = blockIdx.x;
    const int num_all_heads = num_heads + 2 * num_kv_heads;
    wait_for_producer();
    release_consumer();
    const T *source = qkv + token * num_all_heads * D;
    const int slot = slot_mapping[token];
    Angles<D, LANES> angles;
    load_angles(angles, cos, sin, positions[token]);
    const int64_t block = slot >> block_shift;
    const int64_t offset = slot & ((1 << block_shift) - 1);
    // All lanes of a warp go the same way, for the norm.
    for (int base = 0; base < num_all_heads; base += HEADS * stride) {
        const int first = base + threadIdx.x / LANES;
        Head<D, LANES> heads[HEADS];
#pragma unroll
        for (int i = 0; i < HEADS; i++) {
            load_head(heads[i], source + min(first + i * stride, num_all_heads - 1) * D);
        }
#pragma unroll
        for (int i = 0; i < HEADS; i++) {
            const int head = min(first + i * stride, num_all_heads - 1);
            if (bias != nullptr) {
                Head<D, LANES> biases;
                load_head(biases, bias + head * D);
#pragma unroll
                for (int k = 0; k < Head<D, LANES>::PAIRS; k++) {
                    heads[i].first[k] += biases.first[k];
                    heads[i].second[k] += biases.second[k];
                }
            }
            const bool is_value = head >= num_heads + num_kv_heads;
            if (q_norm != nullptr) {
                Head<D, LANES> normed = heads[i];
                norm_head(normed, head < num_heads ? q_norm : k_norm, eps);
                if (!is_value) {
                    heads[i] = normed;
                }
            }
            if (!is_value) {
                turn_head(heads[i], angles);
            }
            if (first + i * stride >= num_all_heads) {
                continue;
            }
            if (head < num_heads) {
                store_head(q_out + (token * num_heads + head) * D, heads[i]);
            } else if (slot >= 0) {
                const int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
                const int64_t row = ((block * num_kv_heads + kv_head) << block_shift) + offset;
                store_head((is_value ? v_cache : k_cache) + row * D, heads[i]);
            }
        }
    }
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
