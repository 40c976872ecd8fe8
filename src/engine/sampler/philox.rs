//! Philox4x32-10, the counter-based random generator of Salmon et al., "Parallel random numbers:
//! as easy as 1, 2, 3" (SC 2011). Random access by counter is what makes a draw independent of
//! all others; cuRAND has the same generator.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const NUM_ROUNDS: usize = 10;

/// Returns the uniform number in `[0, 1)` of a seed and an index, with 53 random bits.
pub(super) fn uniform(seed: u64, index: u64) -> f64 {
    let counter = [index as u32, (index >> 32) as u32, 0, 0];
    let [a, b, _, _] = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(b) << 32 | u64::from(a)) >> 11;
    bits as f64 * (-53.0f64).exp2()
}

fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..NUM_ROUNDS {
        let [first, second] = [0, 1].map(|i| {
            let product = u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]);
            ((product >> 32) as u32, product as u32)
        });
        counter = [
            second.0 ^ counter[1] ^ key[0],
            second.1,
            first.0 ^ counter[3] ^ key[1],
            first.1,
        ];
        key = [0, 1].map(|i| key[i].wrapping_add(KEY_STEPS[i]));
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From `kat_vectors` of the authors' Random123 library.
    #[test]
    fn known_answers_are_reproduced() {
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32(counter, key), want);
        }
    }

    #[test]
    fn uniform_takes_its_bits_as_documented() {
        let want = (0xe169_c58d_6627_e8d5_u64 >> 11) as f64 / 9_007_199_254_740_992.0;
        assert_eq!(uniform(0, 0), want);
        assert_ne!(uniform(0, 1), want);
        assert_ne!(uniform(1 << 32, 0), want);
        assert_ne!(uniform(0, 1 << 32), want);
    }
}
