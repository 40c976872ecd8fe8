//! The passes over a row of logits that the sampler is made of.
//!
//! None sorts the vocabulary: thresholds are found by block maxima and by a histogram of
//! probability mass, and only the few tokens near a threshold are sorted. The loops are written
//! so that the compiler turns them into SIMD.

/// Numbers that one step of a loop takes, a multiple of every SIMD width.
const LANES: usize = 16;
/// Below it `exp` underflows in single precision.
const MIN_EXPONENT: f32 = -87.0;
/// Tokens whose maximum stands for them when a few largest are sought.
const MAXIMUM_BLOCK: usize = 64;
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
    // Without an early exit the loop is one vector comparison an iteration.
    row.iter()
        .fold(0, |any, value| any | u32::from(value.is_nan()))
        != 0
}

/// Returns how many numbers are at least `bound`.
pub(super) fn num_at_least(row: &[f32], bound: f32) -> usize {
    row.iter().filter(|&&value| value >= bound).count()
}

/// Returns the first index that holds `value`, which must be there.
pub(super) fn first_of(row: &[f32], value: f32) -> u32 {
    let (chunks, _) = row.as_chunks::<LANES>();
    let contains = |chunk: &[f32; LANES]| chunk.iter().fold(false, |any, &x| any | (x == value));
    let start = chunks.iter().position(contains).unwrap_or(chunks.len()) * LANES;
    let offset = row[start..].iter().position(|&other| other == value);
    (start + offset.expect("the value was found in this row")) as u32
}

/// Returns the `n`-th largest number, `n` from 1 to the row's length. No number may be NaN.
pub(super) fn nth_largest(row: &[f32], n: usize) -> f32 {
    let mut near: Vec<f32> = match lower_bound_of_nth_largest(row, n) {
        Some(bound) => row.iter().copied().filter(|&x| x >= bound).collect(),
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
    let threshold = nth_largest(row, n);
    let indexed = (0u32..).zip(row.iter().copied());
    let mut near: Vec<_> = indexed.filter(|&(_, x)| x >= threshold).collect();
    // The sort is stable, so equal numbers stay in the order of their indices.
    near.sort_by(|a, b| b.1.total_cmp(&a.1));
    near.truncate(n);
    near
}

/// Returns a number that at least `n` numbers reach, if there are enough blocks to tell.
///
/// The `n`-th largest of the blocks' maxima is one: `n` blocks have such a number.
fn lower_bound_of_nth_largest(row: &[f32], n: usize) -> Option<f32> {
    let mut maxima: Vec<f32> = row.chunks(MAXIMUM_BLOCK).map(max).collect();
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
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [0.0f64; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp(value - max));
        }
    }
    let of_rest = rest.iter().map(|&value| f64::from(exp(value - max)));
    let sum = lanes.into_iter().chain(of_rest).sum::<f64>();
    (f64::from(max) + sum.ln()) as f32
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

/// The tokens that may still be drawn, in ascending id.
#[derive(Debug)]
pub(super) struct Candidates {
    ids: Vec<u32>,
    /// Relative to the largest one, so never positive.
    logits: Vec<f32>,
    /// `exp` of the logits.
    weights: Vec<f32>,
}

impl Candidates {
    /// Takes the tokens whose logit is at least `threshold` and whose weight is not 0.
    ///
    /// `logits` are relative to the largest one.
    pub(super) fn above(logits: &[f32], threshold: f32) -> Self {
        let threshold = threshold.max(MIN_EXPONENT);
        let mut kept = Self {
            ids: vec![0; logits.len()],
            logits: vec![0.0; logits.len()],
            weights: Vec::new(),
        };
        // Storing always and advancing by the comparison has no branch to mispredict.
        let mut len = 0;
        for (id, &logit) in (0u32..).zip(logits) {
            kept.ids[len] = id;
            kept.logits[len] = logit;
            len += usize::from(logit >= threshold);
        }
        kept.ids.truncate(len);
        kept.logits.truncate(len);
        kept.weights = kept.logits.iter().map(|&logit| exp(logit)).collect();
        kept
    }

    /// Keeps the most likely tokens that together have `top_p` of the mass.
    pub(super) fn keep_nucleus(&mut self, top_p: f32) {
        let keys: Vec<f32> = self.logits.iter().map(|&logit| -logit).collect();
        self.keep_mass(&keys, top_p);
    }

    /// Keeps the tokens whose surprise is nearest to the expected one and that together have
    /// `typical_p` of the mass (Meister et al., "Locally typical sampling", 2022).
    ///
    /// With `S = Σ w` and `ln p = logit − ln S`, a token's distance from the entropy
    /// `H = −Σ p ln p` is `|−ln p − H| = |Σ p·logit − logit|`: `ln S` cancels.
    pub(super) fn keep_typical(&mut self, typical_p: f32) {
        let mean_logit = self
            .logits
            .iter()
            .zip(&self.weights)
            .map(|(&logit, &weight)| f64::from(logit) * f64::from(weight))
            .sum::<f64>()
            / self.total();
        let keys: Vec<f32> = self
            .logits
            .iter()
            .map(|&logit| (mean_logit as f32 - logit).abs())
            .collect();
        self.keep_mass(&keys, typical_p);
    }

    /// Returns the token at `uniform`, in `[0, 1)`, of the mass.
    pub(super) fn pick(&self, uniform: f64) -> u32 {
        let target = uniform * self.total();
        let mut sum = 0.0;
        for (&id, &weight) in self.ids.iter().zip(&self.weights) {
            sum += f64::from(weight);
            if sum > target {
                return id;
            }
        }
        // Only rounding leads here.
        *self.ids.last().expect("each filter keeps a token")
    }

    fn total(&self) -> f64 {
        self.weights.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// Keeps the tokens of smallest key that together have `fraction` of the mass, and all that
    /// have the key of the last one.
    fn keep_mass(&mut self, keys: &[f32], fraction: f32) {
        let cutoff = mass_cutoff(keys, &self.weights, f64::from(fraction));
        let mut len = 0;
        for (index, &key) in keys.iter().enumerate() {
            self.ids[len] = self.ids[index];
            self.logits[len] = self.logits[index];
            self.weights[len] = self.weights[index];
            len += usize::from(key <= cutoff);
        }
        self.ids.truncate(len);
        self.logits.truncate(len);
        self.weights.truncate(len);
    }
}

/// Returns the smallest key such that the weights of all keys up to it reach `fraction` of all
/// weights. Keys are not negative.
fn mass_cutoff(keys: &[f32], weights: &[f32], fraction: f64) -> f32 {
    // A float converts to the nearest integer that exists, so large keys share the last bucket.
    let bucket_of = |key: f32| ((key * BUCKETS_PER_UNIT) as usize).min(NUM_BUCKETS - 1);
    let mut buckets = [0.0f64; NUM_BUCKETS];
    for (&key, &weight) in keys.iter().zip(weights) {
        buckets[bucket_of(key)] += f64::from(weight);
    }
    let mut missing = fraction * buckets.iter().sum::<f64>();
    let Some(bucket) = buckets.iter().position(|&mass| {
        let is_reached = mass >= missing;
        if !is_reached {
            missing -= mass;
        }
        is_reached
    }) else {
        return f32::INFINITY;
    };
    let mut near: Vec<(f32, f32)> = keys
        .iter()
        .zip(weights)
        .filter(|&(&key, _)| bucket_of(key) == bucket)
        .map(|(&key, &weight)| (key, weight))
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

#[cfg(test)]
impl Candidates {
    /// Returns the tokens that are left.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }
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
