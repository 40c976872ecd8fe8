// sample: draws one token for each row of logits, as src/engine/sampler.rs does; mark_tokens:
// tells a penalty slot what its sequence has seen.
//
// Shapes:  logits f32 [rows][logits_stride], of which vocab_size count; unchanged.
//          params [rows] of SamplingParams (below), rewritten by the host each step.
//          bias_ids u32, bias_values f32: the rows' (token, bias) pairs, one row after another; a
//          bias of -inf forbids (min_tokens); a token occurs once in a row.
//          mask u32 [masks][mask_stride]: bit t % 32 of word t / 32 allows token t (grammars).
//          counts u16 [slots][counts_stride]: for a slot's sequence and each token, bit 15 is set
//          if it is in the prompt, the rest counts how often it was drawn. `sample` adds the
//          token it draws. counts_stride is even and at least vocab_size.
//          scratch f32 [rows][C][share], used only if a block's share of the row is longer than
//          shared_len; else null.
// Out:     token_ids u32, status u32, logprobs f32, ranks u32 [rows]; top_ids u32, top_logprobs
//          f32 [rows][max_top]. status 0: drawn; 1: the logit of token_ids is not finite (its
//          value in logprobs); 2: no token is left. logprobs, ranks (1 is the most likely) and
//          the top are those of the raw logits, written where num_logprobs ≥ 0.
//          logits on 16 bytes, logits_stride a multiple of 4.
// Launch:  sample: grid (rows · C), block 512, dynamic shared memory 4 · shared_len bytes, where
//          C = 8 from sm_90 on (a cluster; compiled in) and 1 before; a block's share is
//          ⌈vocab_size / C⌉ rounded up to 4. A row
//          with top_k = 0xffffffff (padding of a bucket) is left alone.
//          mark_tokens: grid (any), block (any); ids u32 [num_tokens], the first num_prompt of
//          them the prompt's. The host zeroes the slot first.
// Method:  own. The row stays in shared memory of a cluster. Thresholds come from a radix search
//          over x = (logit − max) / temperature in fixed point (2⁻²⁶), by counts for top_k and by
//          probability mass for top_p and typical_p: sums are of integers, so that the result
//          does not depend on the order of threads. Weights, generator and the choice are those
//          that src/engine/sampler.rs documents.
#include "sampler.cuh"

// One row of `params`.
struct SamplingParams {
    float temperature;
    uint32_t top_k;
    float top_p;
    float min_p;
    float typical_p;
    float repetition_penalty;
    float frequency_penalty;
    float presence_penalty;
    uint64_t seed;
    uint64_t output_index;
    int32_t counts_slot;   // -1: no penalties.
    int32_t mask_row;      // -1: all allowed.
    int32_t num_logprobs;  // -1: none; else the number of top tokens.
    uint32_t bias_start;
    uint32_t bias_end;
    uint32_t padding;
};
static_assert(sizeof(SamplingParams) == 72, "as laid out by the host");

__device__ __forceinline__ bool has_filter(const SamplingParams &params, int vocab_size) {
    return params.min_p > 0.0f || (params.top_k > 0 && params.top_k < (uint32_t)vocab_size) ||
           params.top_p < 1.0f || params.typical_p < 1.0f;
}

// Drops tokens; the values are relative to the largest, after temperature.
__device__ void filter(Row &row, const SamplingParams &params, int vocab_size) {
    const auto below_best = [](float x) { return fabsf(x); };
    if (params.min_p > 0.0f) {
        const float threshold = logf(params.min_p);
        update_each(row.values, row.len,
                    [&](int, float x) { return x >= threshold ? x : -INFINITY; });
    }
    if (params.top_k > 0 && params.top_k < (uint32_t)vocab_size) {
        // With min_p fewer than top_k may be left: then nothing more is dropped.
        int left = 0;
        for_each(row.values, row.len, [&](int, float x) { left += x > -INFINITY; });
        if (row.reduce((double)left, Sum(), 0.0) > params.top_k) {
            keep_up_to(row, find_cutoff(row, params.top_k, 0.0f, below_best), below_best);
        }
    }
    if (params.top_p < 1.0f) {
        keep_up_to(row, find_cutoff(row, 0, params.top_p, below_best), below_best);
    }
    if (params.typical_p < 1.0f) {
        double weighted = 0.0;
        double mass = 0.0;
        for_each(row.values, row.len, [&](int, float x) {
            const float weight = weight_of(x);
            if (weight > 0.0f) {
                weighted += (double)x * weight;
                mass += weight;
            }
        });
        weighted = row.reduce(weighted, Sum(), 0.0);
        const float mean = (float)(weighted / row.reduce(mass, Sum(), 0.0));
        const auto from_mean = [mean](float x) { return fabsf(mean - x); };
        keep_up_to(row, find_cutoff(row, 0, params.typical_p, from_mean), from_mean);
    }
}

// Turns the row's values into weights and returns the token at `uniform` of their sum, in ascending
// order of tokens: to the threads of the warp that finds it, to all others -1.
template <typename Weight> __device__ int pick(Row &row, double uniform, Weight weight) {
    Shared &shared = row.shared;
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    // A warp's part of the share; a multiple of 4 for each lane.
    const int part = (row.len + 4 * THREADS - 1) / (4 * THREADS) * 4;
    const int first = min(warp * part * WARP_SIZE, row.len);
    const int last = min(first + part * WARP_SIZE, row.len);
    double mass = 0.0;
#pragma unroll 2
    for (int i = first + 4 * lane; i < last; i += 4 * WARP_SIZE) {
        // The share's end may leave fewer than four.
        float4 v = *reinterpret_cast<float4 *>(row.values + i);
        v.x = weight(v.x);
        v.y = i + 1 < last ? weight(v.y) : 0.0f;
        v.z = i + 2 < last ? weight(v.z) : 0.0f;
        v.w = i + 3 < last ? weight(v.w) : 0.0f;
        *reinterpret_cast<float4 *>(row.values + i) = v;
        mass += ((double)v.x + v.y) + ((double)v.z + v.w);
    }
    mass = warp_reduce(mass, Sum());
    const double total_of_block_and_others = row.reduce(lane == 0 ? mass : 0.0, Sum(), 0.0);
    // The reduction left each warp's mass in `warps` and each block's in the other slot.
    const double target = uniform * total_of_block_and_others;
    double before = 0.0;
    int chosen = -1;
    double before_chosen = 0.0;
    // Rounding may leave the target a little above all sums: then the last with mass, here and below.
    for (int rank = 0; rank < CLUSTER; rank++) {
        const double other = __longlong_as_double(
            read_u64(address_in(&shared.exchange[row.parity ^ 1], rank)));
        if (other > 0.0 && (chosen < 0 || before <= target)) {
            chosen = rank;
            before_chosen = before;
        }
        before += other;
    }
    if (chosen != row.rank) {
        return -1;
    }
    before = before_chosen;
    int chosen_warp = -1;
    for (int other = 0; other < NUM_WARPS; other++) {
        const double other_mass = __longlong_as_double(shared.warps[other]);
        if (other_mass > 0.0 && (chosen_warp < 0 || before <= target)) {
            chosen_warp = other;
            before_chosen = before;
        }
        before += other_mass;
    }
    if (chosen_warp != warp) {
        return -1;
    }
    // The lane whose part of the warp's part it is, then the place in it.
    const int own_first = min(first + lane * part, last);
    const int own_last = min(own_first + part, last);
    double own = 0.0;
    for (int i = own_first; i < own_last; i++) {
        own += row.values[i];
    }
    const double sum = warp_scan(own);
    const uint32_t with_mass = __ballot_sync(FULL_MASK, own > 0.0);
    const uint32_t reached =
        __ballot_sync(FULL_MASK, own > 0.0 && before_chosen + sum > target);
    const int owner = reached != 0 ? __ffs(reached) - 1 : WARP_SIZE - 1 - __clz(with_mass);
    double running = before_chosen + __shfl_sync(FULL_MASK, sum - own, owner);
    const int begin = __shfl_sync(FULL_MASK, own_first, owner);
    const int end = __shfl_sync(FULL_MASK, own_last, owner);
    int picked = -1;
    for (int i = begin; i < end; i += WARP_SIZE) {
        const float value = i + lane < end ? row.values[i + lane] : 0.0f;
        const double sum_to = warp_scan((double)value);
        const uint32_t kept = __ballot_sync(FULL_MASK, value > 0.0f);
        const uint32_t over =
            __ballot_sync(FULL_MASK, value > 0.0f && running + sum_to > target);
        if (over != 0) {
            picked = i + __ffs(over) - 1;
            break;
        }
        if (kept != 0) {
            picked = i + WARP_SIZE - 1 - __clz(kept);
        }
        running += __shfl_sync(FULL_MASK, sum_to, WARP_SIZE - 1);
    }
    return row.start + picked;
}

// Applies bias, mask and penalties to the share of the row, in the sampler's order.
__device__ void process(Row &row, const SamplingParams &params, const uint32_t *bias_ids,
                        const float *bias_values, const uint32_t *mask, const uint16_t *counts) {
    __syncthreads();
    for (uint32_t i = params.bias_start + threadIdx.x; i < params.bias_end; i += THREADS) {
        const int index = (int)bias_ids[i] - row.start;
        if (index >= 0 && index < row.len) {
            row.values[index] += bias_values[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < row.len; i += THREADS) {
        const int token = row.start + i;
        if (mask != nullptr && (mask[token / 32] >> (token % 32) & 1) == 0) {
            row.values[i] = -INFINITY;
        }
        const uint32_t count = counts != nullptr ? counts[token] : 0;
        if (count == 0) {
            continue;
        }
        float logit = row.values[i];
        if (logit > 0.0f) {
            logit = fminf(__fdiv_rn(logit, params.repetition_penalty), 3.402823466e38f);
        } else {
            logit = __fmul_rn(logit, params.repetition_penalty);
        }
        const uint32_t num_drawn = count & 0x7fff;
        if (num_drawn > 0) {
            logit = __fsub_rn(logit, __fmul_rn(params.frequency_penalty, (float)num_drawn));
            logit = __fsub_rn(logit, params.presence_penalty);
        }
        row.values[i] = logit;
    }
    __syncthreads();
}

// Returns the first of the largest values, as order_of; calls visit(index, value) for each.
template <typename Visit>
__device__ __forceinline__ u64 best_of(Row &row, const float *values, Visit visit) {
    float best = -INFINITY;
    int index = 4 * threadIdx.x;
    for_each(values, row.len, [&](int i, float value) {
        // NaN comes before all, as infinity does.
        const float bounded = value < INFINITY ? value : INFINITY;
        if (bounded > best) {
            best = bounded;
            index = i;
        }
        visit(i, value);
    });
    const u64 order = index < row.len ? order_of(best, row.start + index) : 0;
    return row.reduce(order, Max(), (u64)0);
}

// What a row reports besides its token.
struct Report {
    float *logprob;
    uint32_t *rank;
    uint32_t *top_ids;
    float *top_logprobs;
};

// Writes logprob, rank and top under the raw logits.
__device__ void report(Row &row, const Report &out, const float *logits, int token, float max,
                       int num_top) {
    const float *share = logits + row.start;
    const float logit = logits[token];
    double mass = 0.0;
    int at_least = 0;
    for_each(share, row.len, [&](int, float value) {
        mass += weight_of(value - max);
        at_least += value >= logit;
    });
    mass = row.reduce(mass, Sum(), 0.0);
    const double num_at_least = row.reduce((double)at_least, Sum(), 0.0);
    const float log_sum_exp = (float)((double)max + log(mass));
    const bool is_writer = row.rank == 0 && threadIdx.x == 0;
    if (is_writer) {
        *out.logprob = logit - log_sum_exp;
        *out.rank = (uint32_t)num_at_least;
    }
    u64 last = ~(u64)0;
    for (int place = 0; place < num_top; place++) {
        u64 best = 0;
        for_each(share, row.len, [&](int i, float value) {
            const u64 order = order_of(value, row.start + i);
            best = order < last && order > best ? order : best;
        });
        last = row.reduce(best, Max(), (u64)0);
        if (is_writer) {
            out.top_ids[place] = token_of(last);
            out.top_logprobs[place] = logit_of(last) - log_sum_exp;
        }
    }
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS, 2)
    sample(uint32_t *token_ids, uint32_t *status, float *logprobs, uint32_t *ranks,
           uint32_t *top_ids, float *top_logprobs, const float *logits, float *scratch,
           const SamplingParams *all_params, const uint32_t *bias_ids, const float *bias_values,
           const uint32_t *masks, uint16_t *all_counts, int vocab_size, int64_t logits_stride,
           int64_t mask_stride, int64_t counts_stride, int max_top, int shared_len) {
    extern __shared__ __align__(16) float shared_values[];
    __shared__ Shared shared;
    const int index = blockIdx.x / CLUSTER;
    const int rank = blockIdx.x % CLUSTER;
    wait_for_producer();
    release_consumer();
    const SamplingParams params = all_params[index];
    if (params.top_k == SKIPPED_ROW) {
        return;
    }
    const int share = ((vocab_size + CLUSTER - 1) / CLUSTER + 3) / 4 * 4;
    const int start = min(rank * share, vocab_size);
    const int len = min(share, vocab_size - start);
    float *values =
        share <= shared_len ? shared_values : scratch + (int64_t)blockIdx.x * share;
    Row row = {shared, values, start, len, rank, 0};
    const float *raw = logits + index * logits_stride;
    uint16_t *counts =
        params.counts_slot >= 0 ? all_counts + params.counts_slot * counts_stride : nullptr;
    const uint32_t *mask = params.mask_row >= 0 ? masks + params.mask_row * mask_stride : nullptr;
    const bool is_writer = rank == 0 && threadIdx.x == 0;
    const bool is_greedy = params.temperature < GREEDY_TEMPERATURE;
    const bool is_processed =
        counts != nullptr || mask != nullptr || params.bias_end > params.bias_start;
    const bool needs_copy = is_processed || !is_greedy;

    u64 best = best_of(row, raw + start, [&](int i, float logit) {
        if (needs_copy) {
            values[i] = logit;
        }
    });
    const float raw_max = logit_of(best);
    if (!is_not_finite(best) && is_processed) {
        process(row, params, bias_ids, bias_values, mask, counts);
        best = best_of(row, values, [](int, float) {});
    }
    const bool is_bad = is_not_finite(best);
    if (is_bad || logit_of(best) == -INFINITY) {
        if (is_writer) {
            token_ids[index] = is_bad ? token_of(best) : 0;
            logprobs[index] = is_bad ? raw[token_of(best)] : -INFINITY;
            status[index] = is_bad ? 1 : 2;
        }
        // The last reduction's reads of other blocks' memory must be over before any ends.
        sync_cluster();
        return;
    }
    int token = token_of(best);
    const bool reports = params.num_logprobs >= 0;
    // Who knows the token writes it.
    bool writes = is_writer;
    if (!is_greedy) {
        const float max = logit_of(best);
        const float temperature = fmaxf(params.temperature, MIN_TEMPERATURE);
        const auto scaled = [&](float logit) { return __fdiv_rn(logit - max, temperature); };
        const double at = uniform(params.seed, params.output_index);
        const bool is_filtered = has_filter(params, vocab_size);
        if (is_filtered) {
            update_each(values, len, [&](int, float logit) { return scaled(logit); });
            filter(row, params, vocab_size);
        }
        token = pick(row, at, [&](float value) {
            return weight_of(is_filtered ? value : scaled(value));
        });
        writes = token >= 0 && threadIdx.x % WARP_SIZE == 0;
        if (reports) {
            // The next reduction writes over what the choice was read from.
            __syncthreads();
            // Tokens are counted from 1 here, so that 0 is none.
            token = (int)row.reduce((u64)(token + 1), Max(), (u64)0) - 1;
            writes = is_writer;
        }
    }
    if (reports) {
        const Report out = {logprobs + index, ranks + index, top_ids + (int64_t)index * max_top,
                            top_logprobs + (int64_t)index * max_top};
        report(row, out, raw, token, raw_max, min(params.num_logprobs, max_top));
    }
    if (writes) {
        token_ids[index] = token;
        status[index] = 0;
        // Saturates, so that the prompt's bit stays what it is.
        if (counts != nullptr && (counts[token] & 0x7fff) != 0x7fff) {
            counts[token] += 1;
        }
    }
    sync_cluster();
}

extern "C" __global__ void mark_tokens(uint16_t *counts, const uint32_t *ids, int num_prompt,
                                       int num_tokens, int vocab_size) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_tokens;
         i += gridDim.x * blockDim.x) {
        const uint32_t token = ids[i];
        if (token >= (uint32_t)vocab_size) {
            continue;
        }
        // Two counts share a word, and the hardware has no atomics on half of one.
        uint32_t *word = reinterpret_cast<uint32_t *>(counts) + token / 2;
        const int shift = 16 * (token % 2);
        if (i < num_prompt) {
            atomicOr(word, 0x8000u << shift);
        } else {
            atomicAdd(word, 1u << shift);
        }
    }
}
