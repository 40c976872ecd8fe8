//! numpy's two random generators, as far as LLaMA-Factory's data pipeline draws from them.
//!
//! `num_samples` takes rows by the legacy `np.random.permutation` and `np.random.choice`
//! ([`RandomState`], seeded with `seed`); `val_size` splits by `datasets.train_test_split`, which
//! uses `np.random.default_rng(seed).permutation` ([`default_rng_permutation`]). Sources: numpy's
//! `mtrand.pyx`, `_generator.pyx` and `bit_generator.pyx`; O'Neill, "PCG", 2014.

use super::super::mt19937::Mt19937;

/// numpy's legacy generator, `np.random.seed(seed)`.
#[derive(Debug, Clone)]
pub(super) struct RandomState(Mt19937);

impl RandomState {
    /// Returns the generator of a seed.
    pub(super) fn new(seed: u64) -> Self {
        Self(Mt19937::new(seed))
    }

    /// Returns `np.random.permutation(n)`.
    pub(super) fn permutation(&mut self, n: usize) -> Vec<usize> {
        shuffled(n, || self.0.next_u32())
    }

    /// Returns `np.random.choice(n, count)`: draws with replacement; `n` must be positive.
    pub(super) fn choice(&mut self, n: usize, count: usize) -> Vec<usize> {
        (0..count)
            .map(|_| interval(n as u32 - 1, || self.0.next_u32()))
            .collect()
    }
}

/// Returns `np.random.default_rng(seed).permutation(n)`.
pub(super) fn default_rng_permutation(seed: u64, n: usize) -> Vec<usize> {
    let mut generator = Pcg64::new(seed);
    shuffled(n, || generator.next_u32())
}

/// Shuffles `0..n` from the end, as both generators of numpy do.
fn shuffled(n: usize, mut next: impl FnMut() -> u32) -> Vec<usize> {
    let mut permutation: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let j = interval(i as u32, &mut next);
        permutation.swap(i, j);
    }
    permutation
}

/// Draws from `0..=max`: random bits under the smallest covering mask until they fit.
fn interval(max: u32, mut next: impl FnMut() -> u32) -> usize {
    if max == 0 {
        return 0;
    }
    let mask = u32::MAX >> max.leading_zeros();
    loop {
        let value = next() & mask;
        if value <= max {
            return value as usize;
        }
    }
}

/// PCG XSL-RR 128/64, seeded by numpy's `SeedSequence`.
struct Pcg64 {
    state: u128,
    increment: u128,
    /// The upper half of the last 64 bits, handed out by the next call.
    upper: Option<u32>,
}

impl Pcg64 {
    const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

    fn new(seed: u64) -> Self {
        let [s0, s1, s2, s3] = seed_sequence(seed).map(u128::from);
        let mut generator = Self {
            state: 0,
            increment: (((s2 << 64) | s3) << 1) | 1,
            upper: None,
        };
        generator.step();
        generator.state = generator.state.wrapping_add((s0 << 64) | s1);
        generator.step();
        generator
    }

    fn step(&mut self) {
        self.state = self
            .state
            .wrapping_mul(Self::MULTIPLIER)
            .wrapping_add(self.increment);
    }

    fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(upper) = self.upper.take() {
            return upper;
        }
        let word = self.next_u64();
        self.upper = Some((word >> 32) as u32);
        word as u32
    }
}

/// Returns `np.random.SeedSequence(seed).generate_state(4, np.uint64)`.
fn seed_sequence(seed: u64) -> [u64; 4] {
    const XSHIFT: u32 = 16;
    let mut constant: u32 = 0x43b0_d7e5;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ (value >> XSHIFT)
    };
    let words = [seed as u32, (seed >> 32) as u32, 0, 0];
    let mut pool = words.map(&mut hash);
    for source in 0..4 {
        for target in 0..4 {
            if source != target {
                let mixed = 0xca01_f9dd_u32
                    .wrapping_mul(pool[target])
                    .wrapping_sub(0x4973_f715_u32.wrapping_mul(hash(pool[source])));
                pool[target] = mixed ^ (mixed >> XSHIFT);
            }
        }
    }
    let mut constant: u32 = 0x8b51_f9dd;
    let mut word = |index: usize| {
        let value = pool[index % 4] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(constant);
        u64::from(value ^ (value >> XSHIFT))
    };
    std::array::from_fn(|index| word(2 * index) | (word(2 * index + 1) << 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_draws_are_numpys() {
        let mut random = RandomState::new(42);
        assert_eq!(random.permutation(10), [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]);
        assert_eq!(random.permutation(5), [1, 0, 3, 4, 2]);
        assert_eq!(random.choice(7, 6), [4, 3, 2, 5, 4, 1]);
        let long = RandomState::new(42).permutation(1000);
        assert_eq!(long[..6], [521, 737, 740, 660, 411, 678]);
        assert_eq!(long[997..], [860, 435, 102]);
    }

    #[test]
    fn seeds_spread_as_by_seed_sequence() {
        assert_eq!(
            seed_sequence(42),
            [
                11_465_652_750_463_011_511,
                15_382_171_918_060_459_190,
                9_018_504_550_953_525_431,
                3_703_499_796_004_394_495
            ]
        );
    }

    #[test]
    fn default_rng_permutations_are_numpys() {
        assert_eq!(
            default_rng_permutation(42, 10),
            [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
        );
        assert_eq!(
            default_rng_permutation(12_345_678_901, 7),
            [3, 1, 4, 0, 6, 5, 2]
        );
        let long = default_rng_permutation(42, 2030);
        assert_eq!(long[..6], [1540, 1263, 263, 1380, 1075, 1062]);
        assert_eq!(long[2026..], [1633, 1985, 973, 1672]);
        let longer = default_rng_permutation(0, 100_000);
        assert_eq!(longer[..4], [18_836, 43_996, 91_795, 93_254]);
        assert_eq!(longer[99_996..], [61_469, 81_321, 48_632, 33_375]);
    }
}
