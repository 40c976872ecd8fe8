//! The Mersenne Twister MT19937, the generator behind torch's CPU generator and numpy's
//! `RandomState`.
//!
//! Knows only the stream of 32-bit words; what a library makes of them is in `sampler.rs` (torch)
//! and `dataset/numpy.rs`. Source: Matsumoto and Nishimura, "Mersenne Twister", 1998.

/// Words of state.
const N: usize = 624;
/// Distance of the word that is mixed in.
const M: usize = 397;
const UPPER_MASK: u32 = 0x8000_0000;
const LOWER_MASK: u32 = 0x7fff_ffff;

/// One generator.
#[derive(Debug, Clone)]
pub(super) struct Mt19937 {
    state: Vec<u32>,
    next: usize,
}

impl Mt19937 {
    /// Returns the generator of a seed; torch and numpy both use the low 32 bits.
    pub(super) fn new(seed: u64) -> Self {
        let mut state = vec![seed as u32; N];
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = (previous ^ (previous >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    /// Returns the next 32 random bits.
    pub(super) fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.refill();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn refill(&mut self) {
        for i in 0..N {
            let mixed = (self.state[i] & UPPER_MASK) | (self.state[(i + 1) % N] & LOWER_MASK);
            let twist = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (mixed >> 1) ^ twist;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_published_one() {
        // The first outputs for seed 5489, the reference implementation's default.
        let mut generator = Mt19937::new(5489);
        let first: Vec<u32> = (0..3).map(|_| generator.next_u32()).collect();
        assert_eq!(first, [3_499_211_612, 581_869_302, 3_890_346_734]);
        // C++ requires the 10000th output of std::mt19937 to be this number.
        let last = (3..10_000).map(|_| generator.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
