//! The passes over a row of logits that the sampler is made of.
//!
//! Filters and the draw read logits relative to the largest one, so that a token's weight is
//! `exp(logit)`, and overwrite dropped tokens with [`DROPPED`]. No pass sorts the vocabulary:
//! thresholds are found by block maxima and by a histogram of probability mass, and only the few
//! tokens near a threshold are sorted. The row is not copied where it can be helped: the page
//! faults of fresh memory would take longer than the arithmetic. The loops are written so that
//! the compiler turns them into SIMD.

/// The logit of a token that is not to be drawn.
pub(super) const DROPPED: f32 = f32::NEG_INFINITY;
/// Numbers that one step of a loop takes, a multiple of every SIMD width.
const LANES: usize = 16;
/// Below it `exp` underflows in single precision.
const MIN_EXPONENT: f32 = -87.0;
/// Numbers that are summed together, or passed over together when few are sought.
const BLOCK: usize = 64;
/// The histogram of mass: buckets, and how many of them one unit of the key fills.
const NUM_BUCKETS: usize = 1024;
const BUCKETS_PER_UNIT: f32 = 32.0;

/// Returns the largest number, passing over NaN; `-inf` for an empty row.
pub(super) fn max(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, value);
        }
    }
    let of_lanes = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
    rest.iter().copied().fold(of_lanes, larger)
}

/// Returns whether any number is NaN.
pub(super) fn has_nan(row: &[f32]) -> bool {
    any(row, f32::is_nan)
}

/// Returns whether any number satisfies a simple condition.
///
/// There is no early exit, so that the loop is one vector comparison an iteration.
fn any(row: &[f32], condition: impl Fn(f32) -> bool) -> bool {
    row.iter()
        .fold(0, |any, &value| any | u32::from(condition(value)))
        != 0
}

/// Returns how many numbers are at least `bound`.
pub(super) fn num_at_least(row: &[f32], bound: f32) -> usize {
    row.iter().filter(|&&value| value >= bound).count()
}

/// Returns the numbers that are at least `bound`, with their indices.
fn at_least(row: &[f32], bound: f32) -> impl Iterator<Item = (u32, f32)> {
    // Few are sought as a rule, so most blocks have none.
    (0u32..)
        .step_by(BLOCK)
        .zip(row.chunks(BLOCK))
        .filter(move |(_, block)| any(block, |value| value >= bound))
        .flat_map(|(first, block)| (first..).zip(block.iter().copied()))
        .filter(move |&(_, value)| value >= bound)
}

/// Returns the first index that holds `value`, which must be there.
pub(super) fn first_of(row: &[f32], value: f32) -> u32 {
    let is_wanted = |other: f32| other == value;
    let block = row.chunks(BLOCK).position(|block| any(block, is_wanted));
    let start = block.expect("the value was found in this row") * BLOCK;
    let index = (start..row.len()).find(|&index| is_wanted(row[index]));
    index.unwrap_or(start) as u32
}

/// Returns the `n`-th largest number, `n` from 1 to the row's length. No number may be NaN.
pub(super) fn nth_largest(row: &[f32], n: usize) -> f32 {
    let mut near: Vec<f32> = match lower_bound_of_nth_largest(row, n) {
        Some(bound) => at_least(row, bound).map(|(_, value)| value).collect(),
        None => row.to_vec(),
    };
    *near.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
}

/// Returns the `n` largest numbers with their indices, largest first, then by index.
pub(super) fn largest(row: &[f32], n: usize) -> Vec<(u32, f32)> {
    let n = n.min(row.len());
    if n == 0 {
        return Vec::new();
    }
    let mut near: Vec<_> = at_least(row, nth_largest(row, n)).collect();
    // The sort is stable, so equal numbers stay in the order of their indices.
    near.sort_by(|a, b| b.1.total_cmp(&a.1));
    near.truncate(n);
    near
}

/// Returns a number that at least `n` numbers reach, if there are enough blocks to tell.
///
/// The `n`-th largest of the blocks' maxima is one: `n` blocks have such a number.
fn lower_bound_of_nth_largest(row: &[f32], n: usize) -> Option<f32> {
    let mut maxima: Vec<f32> = row.chunks(BLOCK).map(max).collect();
    if n > maxima.len() {
        return None;
    }
    Some(
        *maxima
            .select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a))
            .1,
    )
}

/// Returns `ln Σ exp(row)`, summed in double precision.
pub(super) fn log_sum_exp(row: &[f32]) -> f32 {
    let max = max(row);
    (f64::from(max) + sum_exp(row, max).ln()) as f32
}

/// Returns `Σ exp(row − max)`, summed in double precision.
fn sum_exp(row: &[f32], max: f32) -> f64 {
    let mut weights = [0.0f32; BLOCK];
    let block_mass = |block: &[f32]| {
        let weights = &mut weights[..block.len()];
        for (weight, &value) in weights.iter_mut().zip(block) {
            *weight = exp(value - max);
        }
        block_sum(weights)
    };
    row.chunks(BLOCK).map(block_mass).sum()
}

/// Returns the sum of a few numbers. Independent partial sums keep the adders busy.
fn block_sum(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0f64; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value);
        }
    }
    let of_rest = rest.iter().map(|&value| f64::from(value));
    lanes.into_iter().chain(of_rest).sum()
}

/// Returns `e^x` for `x ≤ 0` with a relative error below 2e-7; 0 below [`MIN_EXPONENT`].
///
/// The standard library's is a call a number, which takes longer than all other passes
/// together. With `n = round(x / ln 2)` and `r = x − n ln 2`, `|r| ≤ ln 2 / 2`, it is `2ⁿ eʳ`;
/// the polynomial is that of Cephes' `expf`, and `ln 2` is taken in two parts so that `n ln 2`
/// loses no bits.
fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Added and subtracted it rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > MIN_EXPONENT { x } else { MIN_EXPONENT };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut polynomial = 1.987_569_1e-4;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        polynomial = polynomial * r + coefficient;
    }
    let e_to_r = polynomial * r * r + r + 1.0;
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    let two_to_n = f32::from_bits(exponent.wrapping_add(127) << 23);
    if x > MIN_EXPONENT {
        e_to_r * two_to_n
    } else {
        0.0
    }
}

/// Drops the tokens whose logit is below `threshold`.
pub(super) fn keep_at_least(logits: &mut [f32], threshold: f32) {
    for logit in logits {
        *logit = if *logit >= threshold { *logit } else { DROPPED };
    }
}

/// Keeps the most likely tokens that together have `top_p` of the mass.
pub(super) fn keep_nucleus(logits: &mut [f32], top_p: f32) {
    let cutoff = mass_cutoff(logits, |logit| -logit, top_p);
    keep_at_least(logits, -cutoff);
}

/// Keeps the tokens whose surprise is nearest to the expected one and that together have
/// `typical_p` of the mass (Meister et al., "Locally typical sampling", 2022).
///
/// With weights `w`, `S = Σ w` and `ln p = logit − ln S`, a token's distance from the entropy
/// `H = −Σ p ln p` is `|−ln p − H| = |Σ p·logit − logit|`: `ln S` cancels.
pub(super) fn keep_typical(logits: &mut [f32], typical_p: f32) {
    let mut weighted_sum = 0.0;
    let mut sum = 0.0;
    for_each_weight(logits, |logit, weight| {
        weighted_sum += f64::from(logit) * f64::from(weight);
        sum += f64::from(weight);
    });
    let mean = (weighted_sum / sum) as f32;
    let distance = |logit: f32| (mean - logit).abs();
    let cutoff = mass_cutoff(logits, distance, typical_p);
    for logit in logits {
        *logit = if distance(*logit) <= cutoff {
            *logit
        } else {
            DROPPED
        };
    }
}

/// Turns the logits into weights and returns the index at `uniform`, in `[0, 1)`, of their mass.
pub(super) fn pick(logits: &mut [f32], uniform: f64) -> u32 {
    for block in logits.chunks_mut(BLOCK) {
        if any(block, |logit| logit > DROPPED) {
            block.iter_mut().for_each(|logit| *logit = exp(*logit));
        } else {
            block.fill(0.0);
        }
    }
    let weights = logits;
    let masses: Vec<f64> = weights.chunks(BLOCK).map(block_sum).collect();
    let target = uniform * masses.iter().sum::<f64>();
    // Whole blocks first, then one by one from the block in which the target lies.
    let mut sum = 0.0;
    let mut start = 0;
    for mass in masses {
        if sum + mass > target {
            break;
        }
        sum += mass;
        start += BLOCK;
    }
    let mut rest = weights.iter().enumerate().skip(start);
    let picked = rest.find(|&(_, &weight)| {
        sum += f64::from(weight);
        sum > target
    });
    let index = match picked {
        Some((index, _)) => index,
        // Rounding may leave the target a little above the sum.
        None => weights
            .iter()
            .rposition(|&weight| weight > 0.0)
            .unwrap_or(0),
    };
    index as u32
}

/// Calls `visit` with the logit and the weight of each token that was not dropped.
fn for_each_weight(logits: &[f32], mut visit: impl FnMut(f32, f32)) {
    let mut weights = [0.0f32; BLOCK];
    for block in logits.chunks(BLOCK) {
        if !any(block, |logit| logit > DROPPED) {
            continue;
        }
        for (weight, &logit) in weights.iter_mut().zip(block) {
            *weight = exp(logit);
        }
        for (&logit, &weight) in block.iter().zip(&weights) {
            if weight > 0.0 {
                visit(logit, weight);
            }
        }
    }
}

/// Returns the smallest key such that the tokens up to it have `fraction` of the mass. Keys are
/// not negative.
fn mass_cutoff(logits: &[f32], key: impl Fn(f32) -> f32, fraction: f32) -> f32 {
    let mut buckets = [0.0f64; NUM_BUCKETS];
    for_each_weight(logits, |logit, weight| {
        buckets[bucket_of(key(logit)) as usize] += f64::from(weight);
    });
    let mut missing = f64::from(fraction) * buckets.iter().sum::<f64>();
    let Some(bucket) = buckets.iter().position(|&mass| {
        let is_reached = mass >= missing;
        if !is_reached {
            missing -= mass;
        }
        is_reached
    }) else {
        return f32::INFINITY;
    };
    let is_near = |logit: f32| logit > DROPPED && bucket_of(key(logit)) as usize == bucket;
    let mut near: Vec<(f32, f32)> = logits
        .chunks(BLOCK)
        .filter(|block| any(block, is_near))
        .flatten()
        .filter(|&&logit| is_near(logit))
        .map(|&logit| (key(logit), exp(logit)))
        .collect();
    near.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    for &(key, weight) in &near {
        missing -= f64::from(weight);
        if missing <= 0.0 {
            return key;
        }
    }
    // Rounding left a little over: the bucket is taken whole.
    near.last().map_or(f32::INFINITY, |&(key, _)| key)
}

/// Returns the bucket of a key; the order of buckets is that of keys.
///
/// Adding 2²³ leaves the nearest integer in the lowest bits, without the checks of a cast.
fn bucket_of(key: f32) -> u32 {
    const TWO_TO_23: f32 = 8_388_608.0;
    let scaled = (key * BUCKETS_PER_UNIT).min((NUM_BUCKETS - 1) as f32);
    (scaled + TWO_TO_23).to_bits() % NUM_BUCKETS as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_single_precision() {
        let mut worst = 0.0f64;
        for step in 0..870_000 {
            let x = step as f32 * -1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / want - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.5), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn nth_largest_is_found_with_and_without_blocks() {
        let row: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 503) as f32).collect();
        let mut sorted = row.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for n in [1, 2, 10, 16, 17, 200, 999, 1000] {
            assert_eq!(nth_largest(&row, n), sorted[n - 1], "n = {n}");
        }
    }

    #[test]
    fn maximum_and_its_place_do_not_depend_on_the_lanes() {
        for len in [1, 15, 16, 17, 100] {
            for place in 0..len {
                let mut row = vec![-1.0f32; len];
                row[place] = 2.0;
                assert_eq!(max(&row), 2.0);
                assert_eq!(first_of(&row, 2.0) as usize, place);
                assert_eq!(num_at_least(&row, -1.0), len);
                row[place] = f32::NAN;
                assert!(has_nan(&row));
            }
        }
    }
}
